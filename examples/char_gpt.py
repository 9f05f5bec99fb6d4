"""Train a small character-level GPT on the source code of Python's standard library.

Every machine that runs Python already has this data. The same script runs in one process or in several:

    python examples/char_gpt.py
    torchrun --nproc_per_node 2 examples/char_gpt.py
    accelerate launch --multi_gpu --num_processes 2 examples/char_gpt.py  # on CPUs too; `--cpu` starts a single process

`--batch-size` is the total over all processes, so all three commands print the same losses: each update averages over
the same characters, however they are divided among processes. Rounding errors differ, however, and training amplifies
them. After a few hundred updates they show in the printed digits. With `--float64`, they do not.

At the end, the script prints the loss on held-out files and the entropy of their characters. A model that ignores the
preceding characters cannot get below this entropy. The script then generates some code.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import TrainerCallback, get_default_callbacks
from pytorch_accelerated.schedulers import CosineLrScheduler

CONTEXT = 128  # the longest sequence, in tokens
NUM_TOKENS = 128  # a token is the ASCII code of a character
BOUNDARY = 0  # the token before the first and after the last character of a piece of text
NO_TARGET = -100  # the target at padding positions; `F.cross_entropy` ignores it


# 1. The data: every fifth file for training and a few others for validation, cut into pieces of different lengths.


def load_datasets():
    files = Path(os.__file__).parent.glob("*.py")
    modules = sorted(path for path in files if path.stem in sys.stdlib_module_names)
    return read_pieces(modules[::5]), read_pieces(modules[1::50])


def read_pieces(paths):
    """Cut the files into pieces, preferably at a blank line, otherwise at a line end, otherwise anywhere."""
    pieces = []
    for path in paths:
        text = path.read_text(encoding="utf-8").encode("ascii", errors="replace").decode()
        pieces += re.findall(r".{1,125}\n\n|.{1,126}\n|.{1,127}", text, flags=re.DOTALL)
    return [torch.tensor([BOUNDARY, *piece.encode(), BOUNDARY]) for piece in pieces]


def collate(pieces):
    """Pad the pieces to a batch of inputs and targets. The target at each position is the next token."""
    inputs = pad_sequence([piece[:-1] for piece in pieces], batch_first=True, padding_value=BOUNDARY)
    targets = pad_sequence([piece[1:] for piece in pieces], batch_first=True, padding_value=NO_TARGET)
    return inputs, targets  # (batch, longest piece) each


# 2. The model: plain PyTorch.


class GPT(nn.Module):
    """Predicts the next token at each position from the tokens up to that position."""

    def __init__(self, width=96, num_blocks=3, num_heads=3):
        super().__init__()
        self.token_embedding = nn.Embedding(NUM_TOKENS, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        """Return the logits of the next tokens, shape (batch, length, NUM_TOKENS), for tokens (batch, length)."""
        x = self.blocks(self.token_embedding(tokens))  # (batch, length, width)
        return F.linear(self.norm(x), self.token_embedding.weight)  # tied to the input embedding


class Block(nn.Module):
    """A pre-norm transformer block: attention and a feed-forward network, each with a residual connection."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        for last in (self.projection, self.feed_forward[-1]):
            nn.init.zeros_(last.weight)  # each block starts close to the identity

    def forward(self, x):
        """Apply attention, then the feed-forward network, to features of shape (batch, length, width)."""
        x = x + self.attend(self.attention_norm(x))
        return x + self.feed_forward(x)

    def attend(self, x):
        """Apply causal multi-head self-attention."""
        heads = self.queries_keys_values(x).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (batch, heads, length, width per head) each
        # Padding is at the end, so the causal mask already hides it from all other tokens.
        attended = F.scaled_dot_product_attention(rotate(queries), rotate(keys), values, is_causal=True)
        return self.projection(attended.transpose(1, 2).flatten(2))


def rotate(x):
    """Rotate each pair of features by an angle proportional to the position, so that attention sees relative positions.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
    """
    length, width = x.shape[-2:]
    speeds = 10_000 ** -torch.linspace(0, 1, width // 2, device=x.device)
    angles = torch.arange(length, device=x.device).unsqueeze(1) * speeds  # (length, width / 2)
    left, right = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).type_as(x)


def language_model_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)


# 3. The trainer: a step returns the number of characters that its loss averages over. The trainer weights batches by
#    this number, both in the gradients of an update and in the recorded losses, and across accumulation and processes.


class LanguageModelTrainer(Trainer):
    """A trainer that weights each batch by its number of targets."""

    def calculate_train_batch_loss(self, batch):
        """Compute the loss as usual, and add the number of targets to the output."""
        return with_num_targets(super().calculate_train_batch_loss(batch), batch)

    def calculate_eval_batch_loss(self, batch):
        """Do the same in evaluation."""
        return with_num_targets(super().calculate_eval_batch_loss(batch), batch)


def with_num_targets(batch_output, batch):
    _, targets = batch
    return {**batch_output, "num_items_in_batch": (targets != NO_TARGET).sum()}


class PrintLossCallback(TrainerCallback):
    """Prints the mean loss of every `num_updates` updates, over all processes."""

    def __init__(self, num_updates):
        self.num_updates = num_updates
        self.next_update = num_updates
        self.sums = 0

    def on_train_step_end(self, trainer, batch_output, **kwargs):
        """Add to the running sums, and print the mean when it is due."""
        num_targets = batch_output["num_items_in_batch"]
        self.sums = self.sums + torch.stack([batch_output["loss"].detach() * num_targets, num_targets])
        if trainer.progress.num_updates == self.next_update:
            total_loss, num_targets = trainer.gather(self.sums.unsqueeze(0)).sum(dim=0)
            trainer.print(f"update {self.next_update:4}: loss {total_loss / num_targets:.6f}")
            self.next_update += self.num_updates
            self.sums = 0


# 4. The run.


def main():
    arguments = parse_arguments()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun and accelerate launch
    num_parts = arguments.accumulation * num_processes
    if arguments.batch_size % num_parts != 0:
        sys.exit(
            f"--batch-size is {arguments.batch_size}. Choose a multiple of {num_parts} (--accumulation x processes)."
        )
    torch.manual_seed(0)
    train_dataset, validation_dataset = load_datasets()
    model = GPT().double() if arguments.float64 else GPT()

    trainer = LanguageModelTrainer(
        model=model,
        loss_func=language_model_loss,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1),
        callbacks=[*get_default_callbacks(progress_bar=False), PrintLossCallback(arguments.log_every)],
        mixed_precision=choose_precision(),
        accelerator={"cpu": not torch.accelerator.is_available()},  # otherwise Accelerate ignores torchrun on a CPU
    )
    start = time.perf_counter()
    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=arguments.epochs,
        max_num_train_steps=arguments.updates,
        per_device_batch_size=arguments.batch_size // num_parts,
        gradient_accumulation_steps=arguments.accumulation,
        gradient_clip_norm=1.0,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=TrainerPlaceholderValues.NUM_EPOCHS / 10
        ),
        train_dataloader_kwargs={"drop_last": True},  # an update on only a few pieces would be noisy
        eval_dataloader_kwargs={"batch_size": 64},  # does not affect the result
        collate_fn=collate,
    )
    seconds = time.perf_counter() - start

    validation_loss = trainer.run_history.get_latest_metric("eval_loss_epoch")
    trainer.print(f"\nTrained {trainer.progress.num_updates} updates in {seconds:.1f} s.")
    trainer.print(f"Entropy of the characters: {entropy(validation_dataset):.4f} nats")
    trainer.print(f"Validation loss:           {validation_loss:.4f} nats per character")
    if trainer.run_config.is_world_process_zero:  # once, not on every process
        print("\nGenerated code:\n")
        for prompt in ("def ", "class ", "import "):
            print(write_code(trainer.model, prompt))


def choose_precision():
    """Use bf16 on a GPU that supports it. Most CPUs do not, and would be slower with it."""
    is_gpu_used = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if is_gpu_used and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def entropy(pieces):
    """Return the lowest loss that a model can reach if it knows only how often each token occurs."""
    counts = torch.cat([piece[1:] for piece in pieces]).bincount()
    return torch.distributions.Categorical(counts / counts.sum()).entropy().item()


@torch.no_grad()
def write_code(model, prompt, temperature=0.7):
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    tokens = torch.tensor([BOUNDARY, *prompt.encode()])
    while len(tokens) < CONTEXT:
        logits = model(tokens.unsqueeze(0).to(device))[0, -1].cpu()
        token = torch.multinomial((logits / temperature).softmax(dim=0), num_samples=1, generator=generator)
        if token == BOUNDARY:
            break
        tokens = torch.cat([tokens, token])
    return bytes(tokens[1:].tolist()).decode()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training text (default: 1)")
    parser.add_argument("--updates", type=int, help="stop after this many updates, if that comes first")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="pieces per update, over all processes (default: 16)"
    )
    parser.add_argument("--accumulation", type=int, default=2, help="batches per process and update (default: 2)")
    parser.add_argument("--float64", action="store_true", help="use double precision (default: float32)")
    parser.add_argument("--log-every", type=int, default=50, help="updates between two printed losses (default: 50)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
