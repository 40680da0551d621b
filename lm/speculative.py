"""Several tokens a pass with the distribution of one after the other: speculative Jacobi decoding.

A window of tokens is guessed, read in one pass and drawn anew, each from the distribution after the guesses before it.
Those up to the first that comes out differently are certain; the others are the guesses of the next pass (SJD,
arXiv:2410.01699). Draws of one token in two passes are coupled (MC-SJD, arXiv:2510.24211), so that a guess stays where
its distribution hardly changed:

- "gumbel": the token's noise is the same in all passes. The result is that of `OneByOne` with the same generator.
- "maximal": a guess drawn from q stays with probability min(1, p / q), and otherwise gives way to a draw from
  max(0, p - q). No coupling keeps more guesses from one pass to the next.

With lenience (Leviathan et al., arXiv:2211.17192, appendix A.5) the maximal coupling keeps guesses that were drawn more
often than the distribution allows: still fewer passes, for tokens that are less likely than they should be. First
guesses, which nothing but their neighbours speaks for, are kept no more often than they may.

Both couplings are exact for codes of several parts too, since the parts are drawn one after the other. Given the tokens
before it, each guess of a token is a draw from the distribution of its pass, and that of the last pass is the right
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.lm.decoding import Noise, Run
from reelm.lm.sampling import exponential, go_on, race

SHORT = 4  # shorter windows cost more than they save
COUPLINGS = ("gumbel", "maximal")


@dataclass(frozen=True)
class Jacobi:
    """Speculative Jacobi decoding.

    window: tokens that are guessed at once.
    coupling: of the draws of a token in two passes: "gumbel" or "maximal".
    lenience: of the maximal coupling: a guess that was drawn stays with this many times the probability that it may; 1
        is exact, more is faster. What lies outside of top_p never stays.
    columns: what a pass reads at most, over all samples and guidance: large batches have shorter windows, since a
        processor that is busy gains nothing from fewer passes.

    With the maximal coupling which draws a sample gets depends on how fast its neighbours in the batch are, and on the
    window; with the other one it does not.
    """

    window: int = 16
    coupling: str = "gumbel"
    lenience: float = 1.0
    columns: int = 64

    def __post_init__(self) -> None:
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling is one of {', '.join(COUPLINGS)}; got {self.coupling}")
        for name in ("window", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number from 1 on; got {value}")
        if not self.lenience >= 1 or (self.lenience > 1 and self.coupling != "maximal"):
            raise ValueError(
                f"lenience is 1 (exact), or more with coupling=maximal; got {self.lenience} with {self.coupling}"
            )

    def __call__(self, run: Run, noise: Noise, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        share = self.columns // (run.batch * run.copies)
        width = min(self.window, share) if share >= SHORT else 1
        done, guesses = made.shape[1], Guesses(run, made)
        ids = guesses.ids
        certain = torch.full((run.batch,), done, device=ids.device)  # of each sample; the batch waits for its slowest
        lenience = self.lenience if width > 1 else 1.0  # where it saves nothing it costs nothing
        coupled = _Maximal(run, noise, ids, lenience) if self.coupling == "maximal" else None
        if done:
            if coupled is not None:  # how much of the noise is used up says no count of tokens
                go_on(noise.generator, done)
            yield torch.arange(done), made
        while done < run.steps:
            stop = min(done + width, run.steps)
            window, numbers = slice(done, stop), torch.arange(done, stop, device=ids.device)
            guesses.extend(stop)
            first, target = (0, slice(0, stop)) if run.passes == 0 else (done - 1, window)
            hidden = run.read(ids[:, first : stop - 1], slice(first, stop - 1), target)[:, done - stop :]
            if coupled is None:
                noise.drop(done)
                new = run.choose(hidden, window, noise.draw(range(done, stop)))
            else:
                new = coupled.draw(hidden, done, stop)
            new = torch.where(numbers < certain[:, None], ids[:, window], new)
            same = (new == ids[:, window]).long().cumprod(1).sum(1)  # tokens before the first that came out differently
            ids[:, window] = new
            certain = torch.maximum(done + same + 1, certain + 1).clamp_max(stop)
            before, done = done, int(certain.min())
            run.forget(done - 1)
            yield torch.arange(before, done), ids[:, before:done]


class Guesses:
    """The tokens of a run, of which those that were not drawn yet stand as they do nearby.

    The first guess of a token is that at the same place in the nearest frame that there is, else of the row above, else
    of the column to the left, else the token before it.
    """

    def __init__(self, run: Run, made: Tensor) -> None:
        known, head = run.sequence, run.head
        self.known, self.head, self.drawn = known.ids, head, made.shape[1]
        self.ids = torch.empty(run.batch, run.steps, dtype=torch.long, device=made.device)
        self.ids[:, : self.drawn] = made
        places = torch.cat([known.positions[0], run.positions[0]]).tolist()
        there: dict[tuple[int, int], dict[int, int]] = {}  # columns of the frames that have a place, by their times
        self.source = []
        for i, (time, row, col) in enumerate(places):
            if i >= run.columns:
                frames = there.get((row, col), {})
                near = [frames[min(frames, key=lambda other: abs(other - time))]] if frames else []
                near += [there.get(place, {}).get(time) for place in ((row - 1, col), (row, col - 1))]
                self.source.append(next((n for n in near if n is not None), i - 1))
            if time >= 0:
                there.setdefault((row, col), {})[time] = i

    def extend(self, stop: int) -> None:
        """Makes first guesses up to this token."""
        low, columns = self.head.offset, self.known.shape[1]
        for i in range(self.drawn, stop):
            source = self.source[i]
            guess = self.known[:, source] if source < columns else self.ids[:, source - columns]
            self.ids[:, i] = guess.clamp(low, low + self.head.size - 1)
        self.drawn = max(self.drawn, stop)


class _Maximal:
    """Draws that stay with the guess as often as any can that have the right distribution, or `lenience` times that
    where the guess was drawn itself."""

    def __init__(self, run: Run, noise: Noise, ids: Tensor, lenience: float = 1.0) -> None:
        self.run, self.noise, self.ids, self.lenience = run, noise, ids, lenience
        self.start = self.stop = 0
        self.last: list[Tensor] = []  # of each part, what the window's guesses were drawn from: `(B, n, V)`

    def draw(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Ids `(B, stop - start)`."""
        batch, generator = self.run.batch, self.noise.generator
        guesses = self.run.head.split(self.ids[:, start:stop] - self.run.head.offset)
        kept, past = min(max(self.stop - start, 0), stop - start), self.last
        self.start, self.stop, self.last = start, stop, []

        def draw(p: Tensor, part: int) -> Tensor:
            guess = guesses[part].flatten()
            q = torch.zeros(batch, stop - start, p.shape[-1], device=p.device)
            q.scatter_(-1, guesses[part][..., None], 1.0)  # a first guess was certain to be what it is
            if kept:
                q[:, :kept] = past[part][:, -kept:]
            clocks, q = exponential(q, generator).flatten(0, 1), q.flatten(0, 1)
            rest = (p - q).clamp_min(0)
            self.last.append(p.view(batch, stop - start, -1))
            ratio = p.gather(-1, guess[:, None]) / q.gather(-1, guess[:, None])
            ratio.view(batch, -1)[:, :kept] *= self.lenience
            lucky = (-exponential(p.new_empty(batch, stop - start), generator)).exp().view(-1, 1) < ratio
            keep = lucky | (rest.sum(-1, keepdim=True) == 0)
            return torch.where(keep[:, 0], guess, race(rest, clocks))

        return self.run.choose(hidden, slice(start, stop), draw)
