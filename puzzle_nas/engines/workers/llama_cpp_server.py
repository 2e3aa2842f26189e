"""llama.cpp's own server. On machines with AMX it repacks no weights: Q8_0 ones crash there."""

import llama_cpp.llama_cpp as binding  # pyright: ignore[reportMissingImports]
from llama_cpp.server.__main__ import main  # pyright: ignore[reportMissingImports]

default_parameters = binding.llama_model_default_params


def parameters_without_repacking():
    """What llama.cpp would choose, but for the repacking."""
    parameters = default_parameters()
    parameters.use_extra_bufts = False
    return parameters


if b"AMX" in binding.llama_print_system_info():
    binding.llama_model_default_params = parameters_without_repacking
main()
