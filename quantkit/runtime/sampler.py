"""From the logits of a batch to its next tokens: bias, penalties, temperature, top-k, top-p, min-p, and a random number per token.

Each rank holds some columns of the logits. What is exchanged is small: the greatest values, masses and winners; whole rows only
when a top-p takes more tokens than were exchanged. Every rank gets the same tokens, and they do not depend on how the columns are
cut, nor on which other requests share the batch: masses are whole numbers, and randomness is a hash of seed, position and token.
A GPU is not waited for (but by a top-p, which has to know whether it found enough): tokens stay there until somebody asks.
This module knows no text and no model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.comm import Comm
from quantkit.ops.transfer import Download, upload
from quantkit.runtime.params import INVALID, Sampled, SamplingParams, TokenLogprob

__all__ = ["INVALID", "Sampled", "Sampler", "SamplingParams", "TokenLogprob"]

CANDIDATES = 1024
"""The likeliest tokens that a top-p is looked for among before whole rows are sorted."""
CELLS = 1 << 22
"""Logits that are drawn from at a time: it bounds memory beside the logits themselves to some 40 bytes each."""
MASS_BITS = 40
"""Weights of tokens are counted in units of 2^-40 of the likeliest's, so that sums are exact in any order."""
_GOLDEN, _MIX = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
"""splitmix64's constants (Steele, Lea, Flood 2014) as signed numbers."""


def random_key(seed: int, index: int) -> int:
    """64 bits, signed, for position ``index`` of a request with ``seed``: a hash, so there is no state to lose or to share."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "little", signed=True)


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of ``tokens`` under ``keys`` (int64, whose shapes go together): splitmix64's numbers of each key's stream, as float64.

    The token with the greatest sum of logit and noise is drawn with the probability that softmax gives it.
    """
    x = tokens * _GOLDEN + keys
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * factor
    x = x ^ _shifted(x, 31)
    uniform = (_shifted(x, 12).double() + 0.5) * 2.0**-52  # strictly between 0 and 1
    return uniform.log_().neg_().log_().neg_()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x`` as unsigned, shifted right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(slots=True)
class _State:
    """What sampling remembers of a sequence. ``slot``: its row in the table of what it holds, if that is penalized."""

    params: SamplingParams
    seed: int
    ends: tuple[int, ...]
    prompt: tuple[int, ...]
    slot: int | None
    index: int = 0
    scores: dict[int, TokenLogprob] = field(default_factory=dict)
    """Position -> the log-probabilities of the prompt's token there."""


class _History:
    """Which tokens each slot's prompt has and how often its answer has each, over ``width`` columns that begin at ``first``."""

    def __init__(self, first: int, width: int, device: torch.device) -> None:
        self._first, self._device = first, device
        self.prompt = torch.zeros(0, width, dtype=torch.bool, device=device)
        self.counts = torch.zeros(0, width, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def take(self, prompt: Sequence[int]) -> int:
        """A slot for a sequence that begins with ``prompt``."""
        if not self._free:
            rows = self.prompt.shape[0]
            more = max(1, rows)
            self.prompt = torch.cat([self.prompt, self.prompt.new_zeros(more, self.prompt.shape[1])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more, self.counts.shape[1])])
            self._free = list(range(rows, rows + more))
        slot = self._free.pop()
        self.prompt[slot], self.counts[slot] = False, 0
        columns = [token - self._first for token in prompt if 0 <= token - self._first < self.prompt.shape[1]]
        self.prompt[slot, upload(columns, torch.int64, self._device)] = True
        return slot

    def give(self, slot: int) -> None:
        self._free.append(slot)

    def add(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Count one more of ``tokens [B]``, each in its slot; the slots differ."""
        columns = tokens - self._first
        inside = (columns >= 0) & (columns < self.counts.shape[1])
        where = upload(slots, torch.int64, self._device), columns.clamp(0, self.counts.shape[1] - 1)
        self.counts.index_put_(where, inside.int(), accumulate=True)


class Drawn:
    """The next tokens of a batch: on the device at once, for the next pass, and on the CPU when they get there."""

    def __init__(self, found: Tensor, states: Sequence[_State], asked: Sequence[tuple[int, int]], scores: Sequence[Tensor]) -> None:
        self.found = found
        """float64 ``[B, 2]``: the value that won, and its token."""
        self.tokens = found[:, 1].long()
        """``[B]``, some token where the logits were no numbers."""
        self._asked = asked
        self._prompts = [tuple(state.scores[position] for position in sorted(state.scores)) for state in states]
        self._coming = Download(found, *scores)

    def result(self) -> list[Sampled]:
        """Wait for them. From any thread."""
        found, *scores = self._coming.wait()
        tokens = [int(token) if math.isfinite(value) else INVALID for value, token in found.tolist()]
        own = [tokens[row] for row, _ in self._asked]
        logprobs = {
            row: TokenLogprob(one.token, one.logprob, one.top[:count])
            for (row, count), one in zip(self._asked, _logprobs(own, scores) if scores else (), strict=True)
            if one.token != INVALID
        }
        return [Sampled(token, logprobs.get(row), self._prompts[row]) for row, token in enumerate(tokens)]


class Sampler:
    """One rank's part of sampling, and what the running sequences' sampling remembers.

    ``columns``: the tokens whose logits this rank brings; ``vocab``: of all of them; every rank of ``comm`` calls the same with the same.
    A rank without a column brings one of minus infinity.
    """

    def __init__(self, columns: range, vocab: int, comm: Comm, device: torch.device) -> None:
        self._vocab, self._comm, self._device = vocab, comm, device
        self._first, self._width = (columns.start, len(columns)) if columns else (vocab, 1)
        self._states: dict[int, _State] = {}
        self._history = _History(self._first, self._width, device)

    def begin(self, sequence: int, params: SamplingParams, seed: int, ends: tuple[int, ...], prompt: tuple[int, ...]) -> None:
        """Remember a sequence. ``ends``: what it must not sample before ``min_tokens``; ``prompt`` where ``params.reads_prompt``."""
        slot = self._history.take(prompt) if params.penalized else None
        self._states[sequence] = _State(params, seed, ends, prompt, slot)

    def forget(self, sequence: int) -> None:
        slot = self._states.pop(sequence).slot
        if slot is not None:
            self._history.give(slot)

    # the next tokens

    def sample(self, sequences: Sequence[int], logits: Tensor, winners: Tensor | None = None) -> Drawn:
        """The next token of each of ``sequences``, from this rank's columns of its ``logits [B, W]``, which are left as they are.

        In this order: bias, repetition penalty, presence and frequency penalties, no end before ``min_tokens``; temperature; top-k,
        top-p (of what top-k left), min-p (relative to the likeliest). Tokens as likely as the last that a cut leaves are left too.
        ``winners``: what ``winners`` says of these logits, where that is known.
        """
        states = [self._states[sequence] for sequence in sequences]
        shaped = self._shaped(states, logits)
        found = winners if winners is not None and shaped is logits else self.winners(shaped)
        random = [row for row, state in enumerate(states) if not state.params.greedy]
        if random:
            found = found.clone()
        rows_at_once = max(1, CELLS // self._vocab)
        for at in range(0, len(random), rows_at_once):
            rows = upload(random[at : at + rows_at_once], torch.int64, self._device)
            found[rows, 1] = self._draw(shaped[rows], [states[row] for row in random[at : at + rows_at_once]])
        asked = [(row, state.params.logprobs) for row, state in enumerate(states) if state.params.logprobs is not None]
        scores: tuple[Tensor, ...] = ()
        if asked:
            rows = upload([row for row, _ in asked], torch.int64, self._device)
            scores = self._scores(logits[rows], found[rows, 1].long(), max(count for _, count in asked))
        drawn = Drawn(found, states, asked, scores)
        penalized = [(row, state.slot) for row, state in enumerate(states) if state.slot is not None]
        if penalized:
            who = upload([row for row, _ in penalized], torch.int64, self._device)
            self._history.add([slot for _, slot in penalized], drawn.tokens[who])
        for state in states:
            state.index, state.scores = state.index + 1, {}
        return drawn

    def _shaped(self, states: Sequence[_State], logits: Tensor) -> Tensor:
        """``logits`` with bias, penalties and masked ends: the same tensor where nobody asks for any."""
        biases = [(row, token, amount) for row, state in enumerate(states) for token, amount in state.params.logit_bias]
        masked = [(row, token, 0.0) for row, s in enumerate(states) if s.index < s.params.min_tokens for token in s.ends]
        penalized = [(row, state) for row, state in enumerate(states) if state.slot is not None]
        if not (biases or masked or penalized):
            return logits
        shaped = logits.clone()
        rows, columns, amounts = self._cells(biases)
        shaped.index_put_((rows, columns), amounts.to(shaped.dtype), accumulate=True)
        if penalized:
            where = upload([row for row, _ in penalized], torch.int64, self._device)
            shaped[where] = self._penalize(shaped[where], [state for _, state in penalized])
        rows, columns, _ = self._cells(masked)
        shaped[rows, columns] = -math.inf
        return shaped

    def _cells(self, cells: Sequence[tuple[int, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and numbers of those of (row, token, number) that are in this rank's columns."""
        inside = [(row, token - self._first, number) for row, token, number in cells if 0 <= token - self._first < self._width]
        rows, columns, numbers = zip(*inside, strict=True) if inside else ((), (), ())
        places = upload([rows, columns], torch.int64, self._device)
        return places[0], places[1], upload(numbers, torch.float64, self._device)

    def _penalize(self, logits: Tensor, states: Sequence[_State]) -> Tensor:
        """Repetition (Keskar et al. 2019: divides what is positive, multiplies what is not), then presence and frequency (OpenAI's)."""
        slots = upload([state.slot for state in states], torch.int64, self._device)
        counts = self._history.counts[slots]  # [B, W]
        given = counts > 0
        repetition, presence, frequency = self._per_row(
            [(s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty) for s in states], logits.dtype
        )
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(given | self._history.prompt[slots], repeated, logits)
        return logits - presence * given - frequency * counts

    def _per_row(self, numbers: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Each column of ``numbers`` (one list per row of a batch) as ``[B, 1]``."""
        return upload(numbers, dtype, self._device).unsqueeze(1).unbind(2)

    def winners(self, values: Tensor) -> Tensor:
        """The greatest of each row of ``values [B, W]`` over all ranks, and its token, the lowest of equals: float64 ``[B, 2]``."""
        best = values.max(-1)
        found = self._gather(torch.stack([best.values.double(), (best.indices + self._first).double()], -1))  # [B, 2R]
        if self._comm.size == 1:
            return found
        first = found[:, ::2].max(-1)
        return torch.stack([first.values, found[:, 1::2].gather(1, first.indices.unsqueeze(1)).squeeze(1)], -1)

    def _gather(self, x: Tensor) -> Tensor:
        """The ranks' ``x``, of one shape, side by side."""
        return self._comm.all_gather(x, [x.shape[-1]] * self._comm.size)

    def _draw(self, logits: Tensor, states: Sequence[_State]) -> Tensor:
        """A token ``[B]``, float64, for each row of ``logits [B, W]``, none of which is greedy."""
        (temperature,) = self._per_row([(state.params.temperature,) for state in states], torch.float64)
        scaled = logits.double() / temperature
        keys = upload([random_key(state.seed, state.index) for state in states], torch.int64, self._device)
        cut = any(state.params.cut for state in states)
        kept = scaled >= self._floor(scaled, [state.params for state in states]).unsqueeze(1) if cut else None
        if kept is not None and scaled.is_cuda:  # how many are left, a GPU would have to be asked
            scaled, kept = scaled.masked_fill(~kept, -math.inf), None
        if kept is not None:
            rows, columns = kept.nonzero(as_tuple=True)
            raced = torch.full_like(scaled, -math.inf)
            raced[rows, columns] = scaled[rows, columns] + gumbel(keys[rows], columns + self._first)
        else:
            raced = scaled + gumbel(keys.unsqueeze(1), torch.arange(self._first, self._first + self._width, device=self._device))
        return self.winners(raced)[:, 1]

    def _floor(self, scaled: Tensor, params: Sequence[SamplingParams], candidates: int = CANDIDATES) -> Tensor:
        """The least value ``[B]`` of ``scaled [B, W]`` that the cuts leave in each row."""
        floor = torch.full(scaled.shape[:1], -math.inf, dtype=torch.float64, device=self._device)
        kept = [min(p.top_k, self._vocab) if p.top_k > 0 else self._vocab for p in params]
        nucleus = [p.top_p < 1 for p in params]
        count = max(k if p.top_k > 0 else candidates if p.top_p < 1 else 1 for p, k in zip(params, kept, strict=True))
        best = self._best(scaled, min(count, self._vocab))  # [B, C], greatest first
        last = upload(kept, torch.int64, self._device)
        places = torch.arange(best.shape[1], device=self._device)
        cut = last < self._vocab
        floor = torch.where(cut, best.gather(1, (last - 1).clamp(max=best.shape[1] - 1).unsqueeze(1)).squeeze(1), floor)
        if any(nucleus):
            total = self._gather(_mass(scaled, best[:, :1]).sum(-1, keepdim=True)).sum(-1)
            masses = _mass(best, best[:, :1]).masked_fill_(places >= last.unsqueeze(1), 0)
            total = torch.where(cut, masses.sum(-1), total)
            (share,) = self._per_row([(p.top_p,) for p in params], torch.float64)
            sums, wanted = masses.cumsum(-1).double(), share.squeeze(1) * total.double()
            ends = (sums < wanted.unsqueeze(1)).sum(-1)  # the place of the token that completes the share
            inside = upload(nucleus, torch.bool, self._device)
            found = best.gather(1, ends.clamp(max=best.shape[1] - 1).unsqueeze(1)).squeeze(1)
            floor = torch.where(inside, torch.maximum(floor, found), floor)
            beyond = (inside & (ends >= best.shape[1])).nonzero().squeeze(1).tolist()
            if beyond and best.shape[1] < self._vocab:
                floor[beyond] = self._floor(scaled[beyond], [params[row] for row in beyond], self._vocab)
        (least,) = self._per_row([(math.log(p.min_p) if p.min_p else -math.inf,) for p in params], torch.float64)
        return torch.maximum(floor, best[:, 0] + least.squeeze(1))

    def _best(self, values: Tensor, count: int) -> Tensor:
        """The ``count`` greatest of each row over all ranks, greatest first."""
        mine = values.topk(min(count, values.shape[1])).values
        if self._comm.size == 1:
            return mine
        missing = count - mine.shape[1]
        return self._gather(torch.nn.functional.pad(mine, (0, missing), value=-math.inf)).topk(count).values

    # log-probabilities

    def score(self, logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
        """Log-probabilities of ``tokens``, one per row of ``logits [B, W]``, and of the ``count`` likeliest tokens."""
        return _logprobs(tokens, Download(*self._scores(logits, upload(tokens, torch.int64, self._device), count)).wait())

    def _scores(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities ``[B, 1]`` of ``tokens [B]``; the ``count`` likeliest tokens and theirs, two ``[B, C]``; all float64."""
        columns = tokens - self._first
        inside = (columns >= 0) & (columns < self._width)
        chosen = logits.gather(1, columns.clamp(0, self._width - 1).unsqueeze(1)).squeeze(1).masked_fill(~inside, -math.inf)
        own = torch.stack([logits.logsumexp(-1), chosen], -1).double()
        every = self._gather(own)  # [B, 2R]
        total = every[:, ::2].logsumexp(-1, keepdim=True)
        values = every[:, 1::2].max(-1, keepdim=True).values - total
        count = min(count, self._vocab)
        top = logits.topk(min(count, self._width))
        missing = count - top.values.shape[1]
        pairs = torch.cat(
            [
                torch.nn.functional.pad(top.values.double(), (0, missing), value=-math.inf),
                torch.nn.functional.pad((top.indices + self._first).double(), (0, missing)),
            ],
            -1,
        )
        found = self._gather(pairs).view(len(tokens), self._comm.size, 2, count)
        best = found[:, :, 0].flatten(1).sort(descending=True, stable=True)
        ids = found[:, :, 1].flatten(1).gather(1, best.indices[:, :count])
        return values, ids, best.values[:, :count] - total

    def unscored(self, sequence: int, start: int, length: int) -> tuple[int, ...]:
        """The prompt's tokens behind each of positions ``start`` to ``start + length - 1`` that are to be scored."""
        state = self._states[sequence]
        return () if state.params.prompt_logprobs is None or state.index else state.prompt[start + 1 : start + length + 1]

    def score_prompt(self, sequence: int, start: int, logits: Tensor, tokens: Sequence[int]) -> None:
        """Keep the log-probabilities of the prompt's ``tokens`` behind position ``start`` and on; the first sampled token brings them."""
        state = self._states[sequence]
        assert state.params.prompt_logprobs is not None
        state.scores.update(enumerate(self.score(logits, tokens, state.params.prompt_logprobs), start))


def _logprobs(tokens: Sequence[int], scores: Sequence[Tensor]) -> list[TokenLogprob]:
    """What ``Sampler._scores`` made of ``tokens``, on the CPU."""
    return [
        TokenLogprob(token, value[0], tuple((int(other), logprob) for other, logprob in zip(row, logprobs, strict=True)))
        for token, value, row, logprobs in zip(tokens, *(part.tolist() for part in scores), strict=True)
    ]


def _mass(values: Tensor, peak: Tensor) -> Tensor:
    """``exp(values - peak)`` in whole units of 2^-MASS_BITS."""
    return ((values - peak).exp() * (1 << MASS_BITS)).nan_to_num_(0.0, 0.0, 0.0).long()
