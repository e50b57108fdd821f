"""Hypotheses: claims about results as settings, each judged by one of six tests.

A claim becomes a line of `params.yaml`, under `studies`: which test, on which candidates, suites and levels,
what it expects. A test reads the tidy tables and nothing else, so editing a claim reruns the report alone.

| test | question |
|---|---|
| `trend` | does a score rise or fall from candidate to candidate, does a loss grow from level to level |
| `contrast` | how large is a difference, or a difference of differences; is it beyond or within a bound |
| `slope` | how fast does a score change with a number; faster on one line than on another |
| `correlation` | do two scores of the same candidates go together, a third held fixed if need be |
| `saturation` | where does a score level off with training, and is that below a reference |
| `fit` | which of two numbers explains scores better |

Each ends in a `Evidence` (`stages.reporting.hypotheses.evidence`): an effect with its interval, and a p-value
of the side that the effect lies on. `stages.reporting.verdicts` corrects p over the study (Holm) and says
`supported`, `contradicted` or `undecided`. It is undecided if p is too large, if the reference is not
clearly above its floor, if the effect is no larger than the noise, or if the control is not supported.

Items are the units: an item answered by several candidates, in several readouts or draws, counts once
(`stages.reporting.hypotheses.cells`).
"""
