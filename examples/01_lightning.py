"""Lightning attention on one rank: a pack of three documents, output and final states.

python examples/01_lightning.py
"""

import torch

from lasp import SequenceLayout, decay_rates, lightning_attention

HEADS, DIM = 4, 32

torch.manual_seed(0)
layout = SequenceLayout(document_lengths=(300, 1, 211), num_ranks=1)
shape, dtype = (layout.num_tokens, HEADS, DIM), torch.float64
q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
rates = decay_rates(HEADS, layer_index=3, num_layers=8)

output, final_state = lightning_attention(q, k, v, rates, layout=layout)
output.square().mean().backward()
print(f"output {tuple(output.shape)}, one state a document {tuple(final_state.shape)}")

# The state resets at each border: document 2 alone gives the same.
q, k, v, output = (x.detach() for x in (q, k, v, output))
alone = lightning_attention(q[301:], k[301:], v[301:], rates).output
print("same as alone:", torch.allclose(alone, output[301:]))

# A state carries on: the first document in two calls.
_, state = lightning_attention(q[:100], k[:100], v[:100], rates)
tail = slice(100, 300)
second, _ = lightning_attention(q[tail], k[tail], v[tail], rates, initial_state=state)
print("same in two calls:", torch.allclose(second, output[tail]))
