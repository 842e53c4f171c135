"""The passes of lightning attention as launches of the Triton kernels.

The counterpart of ``lasp.ops``, and like there q, k and v are roles. Nothing here waits for the
device or reads from it.
"""

from lasp.launch.device import check_inputs, check_tensor
from lasp.launch.output_pass import key_value_gradients, output
from lasp.launch.state_pass import States, run_states, segment_length

__all__ = [
    "States",
    "check_inputs",
    "check_tensor",
    "key_value_gradients",
    "output",
    "run_states",
    "segment_length",
]
