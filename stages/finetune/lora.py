"""LoRA (2106.09685) that keeps a sparse model sparse, through training, merge and save.

A plain adapter trains W + BA and merges it, which fills every zero of W again. Here the layer computes
W + M * BA with M the nonzero positions of W, in the forward pass as in the merge: what is trained is
what is merged, and a pruned weight stays exactly zero. The price is the product BA at full size once a
step and linear, small beside the forward of a few hundred tokens.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.core.calibration import Calibration
from stages.core.errors import Refusal
from stages.core.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.core.run import Run


class LoRA(Recipe):
    """Train low-rank updates of every block linear on next-token loss, and merge them under the mask."""

    method: Literal["lora"]
    train: Calibration
    """The text trained on: windows of a data set's calibration split."""
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    """The update is scaled by alpha / rank."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak; 10 % linear warm-up, then linear decay to zero."""
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Windows a step."""
    seed: Annotated[int, Field(ge=0)] = 0

    def tune(self, model: "PreTrainedModel", windows: Tensor, run: "Run") -> "PreTrainedModel":
        """Train on `windows` `[num_samples, sequence_length]` and return the merged, plain model.

        Raises:
            Refusal: the loss is no longer a number, or windows are longer than the model reads.
        """
        import peft
        from transformers import Trainer, TrainingArguments
        from transformers.pytorch_utils import Conv1D

        from stages.core.atomic import SCRATCH
        from stages.core.blocks import check_length, linears
        from stages.finetune.masked import MaskedLinear, Windows

        check_length(model, windows, "lora")
        found = linears(model)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[linear.name for linear in found],
            fan_in_fan_out=found[0].transposed,
            task_type="CAUSAL_LM",
        )
        config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
        torch.manual_seed(self.seed)
        adapted = peft.get_peft_model(model, config)
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(
                output_dir=str(SCRATCH / "trainer"),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=max(1, self.steps // 10),
                weight_decay=0.0,
                seed=self.seed,
                data_seed=self.seed,
                logging_steps=max(1, self.steps // 10),
                save_strategy="no",
                report_to="none",
                use_cpu=run.resolved_device().type == "cpu",
                dataloader_pin_memory=False,
            ),
            train_dataset=Windows(windows),
        )
        loss = trainer.train().training_loss
        if not torch.isfinite(torch.tensor(loss)):
            raise Refusal(f"the training loss became {loss}; lower learning_rate (now {self.learning_rate}).")
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged.eval()
