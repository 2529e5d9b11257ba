"""vLLM's scheduler with steps in which a row's block is denoised and no token comes."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput


class CanvasScheduler(Scheduler):
    """The same scheduler but for rows whose whole text was read and that got nothing, since their block has masks left:
    such a row takes part in the next step with its last token again."""

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """What the step gave, for each client."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for name, row in model_runner_output.req_id_to_index.items():
            request = self.requests.get(name)
            # Of a prompt in chunks all but the last give nothing, either.
            if (
                request is not None
                and not model_runner_output.sampled_token_ids[row]
                and request.num_computed_tokens == request.num_tokens
            ):
                request.num_computed_tokens -= 1
        return outputs
