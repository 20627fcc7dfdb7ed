"""What you train is what you deploy: QAT, QLoRA and PEQA on PyTorch Lightning."""

__version__ = "0.1.0"
