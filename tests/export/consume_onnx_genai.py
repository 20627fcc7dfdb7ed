"""Run in a process of its own: onnxruntime-genai builds ONNX without qtrain; what the graphs hold, what they say."""

# ruff: noqa: E402 (the import of qtrain is barred before anything else is imported)

import runpy
import sys
from pathlib import Path

sys.modules["qtrain"] = None  # type: ignore[assignment]

import numpy as np
import onnx
import onnxruntime_genai
from onnx import numpy_helper

# fp32 sums; without the second word the head and the embedding are rounded too.
OPTIONS = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
PARTS = ("codes", "scales", "zero_points")

for directory in sys.argv[1:]:
    built = f"{directory}.onnx"
    sys.argv = ["builder", *("-i", directory, "-o", built, "-c", f"{directory}.cache")]
    sys.argv += [*("-p", "int4", "-e", "cpu"), "--extra_options", *OPTIONS]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    graph = onnx.load(Path(built, "model.onnx")).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    seen = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            options = {attribute.name: attribute.i for attribute in node.attribute}
            seen[f"{node.name}.shape"] = np.array([options[key] for key in ("N", "K", "bits", "block_size")])
            for part, name in zip(PARTS, node.input[1:4], strict=False):
                seen[f"{node.name}.{part}"] = numpy_helper.to_array(held[name])
    model = onnxruntime_genai.Model(built)
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=52, min_length=52, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(np.arange(5, 25, dtype=np.int32))
    logits = generator.get_output("logits").copy()
    while not generator.is_done():
        generator.generate_next_token()
    np.savez(f"{directory}.npz", logits=logits, tokens=generator.get_sequence(0), **seen)
