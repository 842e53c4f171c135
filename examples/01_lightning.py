"""Lightning attention on one rank: a pack of three documents, output and final states.

python examples/01_lightning.py
"""

import torch

from lasp import SequenceLayout, decay_rates, lightning_attention

HEADS, DIM = 4, 32

torch.manual_seed(0)
layout = SequenceLayout(document_lengths=(300, 1, 211), num_ranks=1)
q, k, v = (torch.randn(layout.num_tokens, HEADS, DIM, requires_grad=True) for _ in range(3))
rates = decay_rates(HEADS, layer_index=3, num_layers=8)

output, final_state = lightning_attention(q, k, v, rates, layout=layout)
output.square().mean().backward()
print(f"output {tuple(output.shape)}, one state a document {tuple(final_state.shape)}")

# The state resets at each border: document 2 alone gives the same.
alone = [x[301:].detach() for x in (q, k, v)]
print("same as alone:", torch.allclose(lightning_attention(*alone, rates).output, output[301:]))

# A state carries on: the first document in two calls.
head = lightning_attention(*(x[:100].detach() for x in (q, k, v)), rates)
tail = lightning_attention(
    *(x[100:300].detach() for x in (q, k, v)), rates, initial_state=head.final_state
)
print("same in two calls:", torch.allclose(tail.output, output[100:300], atol=1e-5))
