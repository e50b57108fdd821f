"""Recover a compressed model: load it, train it by the recipe's method, write the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core.files import SCRATCH
from stages.corpus import examples
from stages.corpus.bos import begun
from stages.model import artifact, checkpoint, resume
from stages.recovery.curve import held_out_curve, write_curve
from stages.recovery.grids import source_grid
from stages.recovery.objective import check_packing
from stages.recovery.saves import Checkpoints
from stages.recovery.training import held_out_loss, refusing_out_of_memory, train

if TYPE_CHECKING:
    from stages.core.run import Run
    from stages.recovery.tuning import Tuning


def recover(recipe: Tuning, run: Run, name: str) -> None:
    """Train the recipe's source, and write data/models/finetune/<name> and its learning curve.

    Raises:
        Refusal: the data or the source does not fit the recipe, memory does not suffice, or training
            diverged.
    """
    folder = resume.place(SCRATCH / "finetune" / name, "finetune", recipe, run)
    checkpoints = Checkpoints(folder, recipe.checkpoint_every)
    with refusing_out_of_memory(recipe):
        model = artifact.load_model(recipe.source, run, dequantize=True)
        tokenizer = artifact.load_tokenizer(recipe.source)
        data = examples.load_examples(recipe.train, tokenizer, model.config)
        check_packing(model, data.train)
        arm = recipe.arm(model, source_grid(recipe.source, model))
        points = train(f"finetune {name}", recipe, arm, data, checkpoints)
        recovered = arm.finish()
        write_curve(points, name)
        rows = [item.input_ids.tolist() for row in data.train + data.held_out for item in row]
        notes = {
            **recovered.notes,
            "bos": begun(rows, tokenizer),
            "steps": points[-1].step,
            "tokens": points[-1].tokens,
            "curve": held_out_curve(points),
            "trained_parameters": sum(parameter.numel() for parameter in arm.trained().values()),
            # Of the model as written: after merging, or rounding to the source's grid.
            "held_out_loss": held_out_loss(recovered.model, data.held_out, recipe.batch_size),
        }
        checkpoint.save(
            f"finetune/{name}",
            recovered.model,
            recipe,
            run,
            zeros=recovered.zeros,
            quantized=recovered.codes,
            notes=notes,
        )
    checkpoints.clear()
