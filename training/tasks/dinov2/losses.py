"""The losses of DINOv2, and the targets made from a teacher's logits, over the global batch.

A loss is a mean over this process's rows. Its mean over processes is that of the global batch, provided that all
processes have equally many crops. Temperatures of losses are the student's.
"""

# Letters: B images of this process, S and T crops per image, M masked patches, D channels, K prototypes.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreg_hub.training.distributed.collectives import all_gather_with_grad, all_reduce_max, all_reduce_sum, rank


def dino_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of each student crop against each teacher crop of the same image: sum over pairs, mean over images.

    It takes logits [S, B, K] and probabilities [T, B, K].

    Source: DINO, arXiv 2104.14294, section 3.1; dinov2/loss/dino_clstoken_loss.py (Apache-2.0).
    """
    # the cross-entropy is linear in the target, so there is no need for a loop over pairs
    return _cross_entropy(student, teacher.float().sum(dim=0), temperature).sum(dim=0).mean()


def dino_local_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """DINO's term for local crops: each against both global ones, divided by the number of all pairs.

    It takes logits of the local crops' class tokens [S, B, K] and probabilities for those of the global ones [2, B, K].

    Source: dinov2/train/ssl_meta_arch.py (Apache-2.0).
    """
    return dino_loss(student, teacher, temperature=temperature) / _num_pairs(student.shape[0])


def dino_global_loss(student: Tensor, teacher: Tensor, *, num_local: int, temperature: float = 0.1) -> Tensor:
    """DINO's term for global crops: each against the other one, divided by the number of all pairs.

    It takes logits of the global crops' class tokens and probabilities for the same crops, in the same order [2, B, K].

    Source: dinov2/train/ssl_meta_arch.py (Apache-2.0).
    """
    return _cross_entropy(student, teacher.flip(0), temperature).mean() * 2 / _num_pairs(num_local)


def ibot_loss(student: Tensor, teacher: Tensor, weights: Tensor, *, num_crops: int, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of masked patches: mean over the patches of a crop, then over crops, unmasked ones counted as 0.

    It takes logits of masked patches and probabilities for them [M, K], where M may be 0; one over the number of masked
    patches of a patch's crop [M]; and the number of this process's global crops, including unmasked ones.

    Source: iBOT, arXiv 2111.07832, section 3; dinov2/loss/ibot_patch_loss.py (Apache-2.0).
    """
    return (_cross_entropy(student, teacher, temperature) * weights).sum() / num_crops


def koleo_loss(features: Tensor, *, global_batch: bool = True, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko estimator: minus the mean log distance of unit vectors to their nearest neighbours.

    They are the backbone's class tokens of one crop of each image [B, D]. Neighbours are looked for among the images of
    all processes, whose number then changes nothing, or as upstream among those of one.

    Source: arXiv 1806.03198, section 3; dinov2/loss/koleo_loss.py (Apache-2.0).
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=-1, eps=eps)
        everyone = all_gather_with_grad(own) if global_batch else own
        with torch.no_grad():
            similarities = own @ everyone.T
            similarities.diagonal(rank() * len(own) if global_batch else 0).fill_(-1)
            nearest = similarities.argmax(dim=1)
        distances = F.pairwise_distance(own, everyone[nearest], eps=eps)
        return -(distances + eps).log().mean()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, *, iterations: int = 3) -> Tensor:
    """A teacher's probabilities, such that all prototypes are used about equally over the global batch.

    Rows and columns of exp(logits / temperature) are divided by their sums in turn. Each pass only adds one number to
    all logits of a prototype, so the result is a softmax. Unlike upstream, this works with logarithms, where nothing
    can overflow or vanish. Constant factors, such as upstream's number of rows, cancel out.

    Of the teacher's logits [M, K] in this process, whose M may differ from others' and be 0, it makes probabilities
    [M, K] in float32.

    Source: SwAV, arXiv 2006.09882, section 3.1; dinov2/loss/dino_clstoken_loss.py (Apache-2.0).
    """
    scaled = logits.float() / temperature
    rows, prototypes = scaled.new_zeros(len(scaled), 1), scaled.new_zeros(scaled.shape[1])
    for _ in range(iterations):
        prototypes = -_global_logsumexp(scaled + rows)
        rows = -(scaled + prototypes).logsumexp(dim=1, keepdim=True)
    return (scaled + prototypes).softmax(dim=1)


class RunningCentre(nn.Module):
    """A teacher's probabilities after subtracting a running mean from its logits.

    As upstream, a batch moves the centre only when the next one is centred. Both centres are buffers, so a resumed run
    computes the same as an uninterrupted one: what the last call subtracted [K], and what the next one will.

    Source: dinov2/loss/dino_clstoken_loss.py, ibot_patch_loss.py (Apache-2.0). In iBOT's centre, upstream gives equal
    weights to processes; here all patches weigh the same, so the number of processes changes nothing.
    """

    center: Tensor
    next_center: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("next_center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Probabilities [M, K] in float32 for the teacher's logits [M, K], centred by what `update` got last."""
        self.center.copy_(self.next_center)
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the next call's centre towards the mean of the logits [M, K] of all processes; M may be 0 in some."""
        sums = torch.cat([logits.float().sum(dim=0), self.center.new_tensor([len(logits)])])
        total, count = all_reduce_sum(sums).split([len(self.center), 1])
        moved = self.center * self.momentum + total / count * (1 - self.momentum)
        self.next_center.copy_(torch.where(count > 0, moved, self.center))


def _cross_entropy(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row [..., K], in float32 even under autocast [...]."""
    return -(probabilities * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def _num_pairs(num_local: int) -> int:
    """Two pairs of global crops, and two for each local crop; without local crops upstream counts one pair for them."""
    return 2 + max(2 * num_local, 1)


def _global_logsumexp(x: Tensor) -> Tensor:
    """Logarithm of each column's sum of exponentials over the rows of all processes [K]."""
    own = x.logsumexp(dim=0)
    largest = all_reduce_max(own)
    return largest + all_reduce_sum((own - largest).exp()).log()
