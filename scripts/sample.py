"""Generate text from a run's last checkpoint.

    python scripts/sample.py logs/cpu/muon_600_seed-1 --prompt "ROMEO"

Tokens are bytes for a vocabulary of 256, and GPT-2's BPE for one of 50257, or of 50304 with 47 that no
text has. Runs on other tokens cannot be sampled. Each next token is drawn from softmax(logits /
temperature) over the --top_k most likely ones, until there are --tokens of them or the document ends.
"""
import argparse
import codecs
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command
from train_gpt2 import (  # before torch: it says how CPU threads wait
    Config, UserError, checkpoints, make_model)
import torch


def load_model(path):
    """(model, its Config, steps it was trained) of a checkpoint, or of the newest one in a run's folder.

    Raises UserError if there is none.
    """
    files = [path] if path.is_file() else list(checkpoints(path).values())
    if not files:
        raise UserError(f"{path}: no checkpoint (step_*.pt, or a run's folder with checkpoints/) is there; "
                        "records keep no weights")
    try:
        checkpoint = torch.load(files[-1], map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        model = make_model(config)
        model.load_state_dict(checkpoint["model"])
        return model.eval(), config, checkpoint["progress"]["step"]
    except UserError:  # the model is no longer there
        raise
    except Exception as error:  # torch.load raises whatever the bytes make it raise
        fault = type(error).__name__
        raise UserError(f"{files[-1]} is not a checkpoint of this train_gpt2.py ({fault})") from None


def tokenizer(vocab_size):
    """(encode: str -> tokens, decode: token -> bytes, the token that starts a document)"""
    if vocab_size == 256:
        return lambda text: list(text.encode()), lambda token: bytes([token]), 255
    if vocab_size in (50257, 50304):
        from data.shards import gpt2_encoding
        encoding = gpt2_encoding()

        def decode(token):
            return encoding.decode_single_token_bytes(token) if token < 50257 else b""

        return encoding.encode_ordinary, decode, encoding.eot_token
    raise UserError(f"vocab_size = {vocab_size}: neither bytes (256) nor GPT-2's BPE (50257, or 50304 with "
                    "padding), so its tokens have no known text")


@torch.no_grad()
def generate(model, tokens, number, sequence_length, temperature=1.0, top_k=None, generator=None):
    """Yields up to `number` tokens that follow the list `tokens`.

    The model sees the last `sequence_length` tokens.

    temperature 0 takes the most likely token; top_k limits the choice to that many.
    """
    tokens = list(tokens)
    device = next(model.parameters()).device
    for _ in range(number):
        logits = model.logits(torch.tensor([tokens[-sequence_length:]], device=device))[0, -1].cpu()
        if not logits.max() < float("inf"):
            raise UserError("the model's logits are not finite: "
                            "the run had diverged when it wrote this checkpoint")
        if top_k and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        if temperature < 1e-30:  # float32 has nothing much smaller
            token = logits.argmax()
        else:
            probabilities = ((logits - logits.max()) / temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
        tokens.append(int(token))
        yield tokens[-1]


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or a checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--tokens", type=int, default=300, help="(default: 300)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: always the most likely token (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="choose among that many (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    in_range = (args.tokens >= 0 and 0 <= args.temperature < float("inf")
                and (args.top_k is None or args.top_k >= 1) and 0 <= args.seed < 2 ** 63)
    if not in_range:
        raise UserError(f"--tokens {args.tokens} --temperature {args.temperature} --top_k {args.top_k} "
                        f"--seed {args.seed}: must be 0 or more, top_k at least 1, seed below 2^63")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU here; --device cpu does without")
    return args


@command(interrupted="")
def main():
    sys.stdout.reconfigure(errors="replace")  # models write what not every terminal can show
    args = parse()
    model, config, step = load_model(args.run)
    encode, decode, start = tokenizer(config.vocab_size)
    print(f"{args.run}: {config.optimizer}, step {step}", file=sys.stderr)
    prompt = os.fsencode(args.prompt).decode(errors="replace")
    print(prompt, end="", flush=True)
    tokens = generate(model.to(args.device), [start, *encode(prompt)], args.tokens, config.sequence_length,
                      args.temperature, args.top_k, torch.Generator().manual_seed(args.seed))
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
    for token in tokens:
        if token == start:
            break
        print(text.decode(decode(token)), end="", flush=True)
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    main()
