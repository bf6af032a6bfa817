"""What preferences are learned by: losses of pairs of answers to one prompt, and of single answers.

P pairs, the first answer of each preferred to the second (chosen, rejected); A single answers. A loss is a function of
an answer's sum over its tokens of

- the log-ratio, log p(token) under the policy less that under the reference, for DPO, its variants and KTO. Taken
  token by token, it is exactly 0 in the first step, and rounding does not grow with the answer;
- the log-probability under the policy, for the losses without a reference.

beta weighs how far the policy may leave the reference. Every loss is finite, with finite gradients, in fp32 and for
answers of one token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Sums over the tokens of chosen and rejected answers [P], log-ratios or log-probabilities, and how many tokens
    each has (at least 1).
    """

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_lengths_P: Tensor
    rejected_lengths_P: Tensor

    def margins(self) -> Tensor:
        return self.chosen_P - self.rejected_P

    def means(self) -> tuple[Tensor, Tensor]:
        """Averages over tokens of the chosen answers and of the rejected ones."""
        return self.chosen_P / self.chosen_lengths_P, self.rejected_P / self.rejected_lengths_P

    def mean_margins(self) -> Tensor:
        chosen_P, rejected_P = self.means()
        return chosen_P - rejected_P


def _cross_entropy(logits_P: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of the logits, if a share `smoothing` of the preferences is the wrong way round (cDPO: Mitchell,
    "A note on DPO with noisy preferences", 2023, equation 3).
    """
    return -(1 - smoothing) * F.logsigmoid(logits_P) - smoothing * F.logsigmoid(-logits_P)


def sigmoid(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, equation 7); with smoothing, cDPO."""
    return _cross_entropy(beta * pairs.margins(), smoothing)


def sigmoid_norm(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """DPO of averages over tokens (Tulu 3, arXiv 2411.15124)."""
    return _cross_entropy(beta * pairs.mean_margins(), smoothing)


def robust(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """An unbiased estimate of DPO's loss under preferences of which a share `smoothing`, below 0.5, is the wrong way
    round (Chowdhury et al., arXiv 2403.00409).
    """
    logits_P = beta * pairs.margins()
    right_P, wrong_P = -F.logsigmoid(logits_P), -F.logsigmoid(-logits_P)
    return ((1 - smoothing) * right_P - smoothing * wrong_P) / (1 - 2 * smoothing)


def exo(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """EXO of pairs: the reverse KL divergence to preferences of 1 - smoothing (Ji et al., arXiv 2402.00856, equation
    16). Without smoothing it is infinite: more than 0 is needed.
    """
    logits_P = beta * pairs.margins()
    chosen_P = torch.sigmoid(logits_P) * (F.logsigmoid(logits_P) - math.log1p(-smoothing))
    rejected_P = torch.sigmoid(-logits_P) * (F.logsigmoid(-logits_P) - math.log(smoothing))
    return chosen_P + rejected_P


def hinge(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """SLiC's hinge on DPO's logits (Zhao et al., arXiv 2305.10425; Liu et al., arXiv 2309.06657)."""
    return torch.relu(1 - beta * pairs.margins())


def ipo(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, equation 17, whose tau is beta), of averages over tokens, as its authors'
    results are.
    """
    return (pairs.mean_margins() - 1 / (2 * beta)) ** 2


def apo_zero(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """APO for chosen answers that are better than the policy's own: raises them and lowers the rejected ones
    (D'Oosterlinck et al., arXiv 2408.06266, equation 7).
    """
    return torch.sigmoid(-beta * pairs.chosen_P) + torch.sigmoid(beta * pairs.rejected_P)


def apo_down(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """APO for chosen answers that are worse than the policy's own: lowers them, and the rejected ones more
    (D'Oosterlinck et al., arXiv 2408.06266, equation 8).
    """
    return torch.sigmoid(beta * pairs.chosen_P) + torch.sigmoid(-beta * pairs.margins())


# DPO's variants, of log-ratios: (pairs, beta, smoothing) -> [P]. hinge, ipo, apo_zero and apo_down have no smoothing.
LOSSES: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo": exo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid_norm,
}


def cpo(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """The preference term of CPO, DPO whose reference is uniform, of log-probabilities (Xu et al., arXiv 2401.08417,
    equation 3). CPO adds the negative log-likelihood of the chosen answers.
    """
    return sigmoid(pairs, beta, smoothing)


def simpo(pairs: Pairs, beta: float, smoothing: float, gamma: float) -> Tensor:
    """SimPO: averages of log-probabilities over tokens, which are to differ by more than gamma / beta (Meng et al.,
    arXiv 2405.14734, equation 6).
    """
    return _cross_entropy(beta * pairs.mean_margins() - gamma, smoothing)


def orpo(pairs: Pairs) -> Tensor:
    """ORPO's odds ratio term of averages of log-probabilities over tokens (Hong et al., arXiv 2403.07691, equations 4
    and 7). ORPO adds it, times beta, to the negative log-likelihood of the chosen answers.
    """

    def log_odds(mean_P: Tensor) -> Tensor:
        # log p - log(1 - p), whose second term needs no more than p's own precision. The odds of p = 1 are infinite.
        mean_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).eps)
        return mean_P - torch.log(-torch.expm1(mean_P))

    chosen_P, rejected_P = pairs.means()
    return -F.logsigmoid(log_odds(chosen_P) - log_odds(rejected_P))


def kto(
    ratios_A: Tensor,
    desirable_A: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO [A], of log-ratios (Ethayarajh et al., arXiv 2402.01306, equation 7).

    Args:
        desirable_A: bool, which answers are labelled as desirable.
        kl: z0, a scalar without gradient that is not negative: how far the policy is from the reference. The paper
            estimates it by the mean log-ratio of answers to other prompts.
    """
    gains_A = torch.where(desirable_A, ratios_A - kl, kl - ratios_A)
    return torch.where(desirable_A, desirable_weight, undesirable_weight) * torch.sigmoid(-beta * gains_A)
