import torch

from qtrain.modules.growing_keys import growing_keys


def test_cudnn_is_out_while_a_text_grows_and_back_afterwards() -> None:
    flags = torch.backends.cuda
    before = flags.cudnn_sdp_enabled()
    with growing_keys():
        assert not flags.cudnn_sdp_enabled()
        assert flags.flash_sdp_enabled()
        assert flags.math_sdp_enabled()
    assert flags.cudnn_sdp_enabled() == before
