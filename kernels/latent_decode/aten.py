"""`avl::latent_decode` in ATen, on a CPU without a C++ compiler: whole rows of logits, on any device.

Which keys are read is looked at on the device, so nothing waits for it; those that are not are multiplied with all the
same, and hidden.
"""

import torch
from torch import Tensor

from avl_fx.kernels.inherited_decode.reference import named
from avl_fx.kernels.partitioned_decode.capacity import with_spare_row


def latent_decode_aten(
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    new_latents: Tensor | None,
    new_rotated: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    weigh: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`avl::latent_decode`; see the schema for shapes."""
    if new_latents is not None and new_rotated is not None:
        latents, rotated = with_spare_row(latents), with_spare_row(rotated)
        latents.narrow(2, latents.shape[2] - 1, 1).copy_(new_latents)
        rotated.narrow(2, rotated.shape[2] - 1, 1).copy_(new_rotated)
    batch, _, keys, rank = latents.shape
    heads = query.shape[1]
    # Half precision has no product everywhere that accumulates and returns float32.
    rows, values = query.squeeze(2).float() * scale, latents.squeeze(1).float()
    logits = torch.bmm(rows[..., :rank], values.transpose(1, 2))
    logits = logits + torch.bmm(rows[..., rank:], rotated.squeeze(1).float().transpose(1, 2))
    hidden = ~named(segments, batch, keys, query.device)[:, None].expand(batch, heads, keys)
    if mask is not None:
        full = mask.expand(batch, heads, 1, keys).squeeze(2)
        hidden = hidden | (~full if full.dtype == torch.bool else full == -torch.inf)
        logits = logits if full.dtype == torch.bool else logits + full
    probabilities = torch.softmax(logits.float().masked_fill(hidden, -torch.inf), 2).masked_fill(hidden, 0.0)
    # 0 * NaN would be NaN: what no head sees may hold anything.
    out = torch.bmm(probabilities, values.masked_fill(hidden.all(1)[..., None], 0.0))
    weights = probabilities.mean(1, keepdim=True)
    return out.to(query.dtype)[:, :, None], weights[..., :0] if weigh is None else weights
