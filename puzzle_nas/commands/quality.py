"""Commands that talk to a model and say what it lost."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from puzzle_nas.commands.app import app


@app.command("generate")
def generate_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint or .gguf file, or a run folder for its child.")
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to ask the model; each prompt on its own.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="For a run: the parent's answers too.")] = False,
) -> None:
    """Let a parent or child answer."""
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.families import load_with_tokenizer, parent_checkpoint
    from puzzle_nas.families.generation import answer
    from puzzle_nas.machine import this_machine

    is_run = (model / "recipe.yaml").is_file()
    if with_parent and not is_run:
        raise RecipeError(f"{model} is not a run folder, which --with-parent needs; leave it out.")
    speakers = {"child": model / "child-gkd" if is_run else model}
    if with_parent:
        speakers["parent"] = parent_checkpoint(RunFolder(model))
    loaded = {name: load_with_tokenizer(checkpoint, this_machine()) for name, checkpoint in speakers.items()}
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {prompt}")
        for name, (language_model, tokenizer) in loaded.items():
            if with_parent:
                print(f"{name}: ", end="")
            for piece in answer(language_model, tokenizer, prompt, max_new_tokens, not plain, temperature):
                print(piece, end="", flush=True)
            print()


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run folder (its child against its parent), a checkpoint, or an export for llama.cpp, run there.",
        ),
    ],
    parent: Annotated[Path | None, typer.Option(help="A checkpoint to compare with. Default: a run's own.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=DOMAIN]", help="Text; repeatable. Default: the run's validation split."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of each sequence of --data.")] = 512,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each domain.")] = 16_384,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="JSON lines with question, choices and answer, or a task of lm-eval's; repeatable.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Items of each task. Default: all.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of task files, only the half that scoring.task does not use.")
    ] = False,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Text and questions at 512, 1024, ... tokens.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Longest length of --long-context. Default: the parent's.")
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="Questions of each kind at each length.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model lost against its parent, with standard errors; any transformers model.

    Results of a run are also kept in RUN/evaluations.
    """
    from puzzle_nas.evaluation.evaluate import Asked, evaluate
    from puzzle_nas.evaluation.tables import show_evaluation
    from puzzle_nas.report.terminal import print_tables

    asked = Asked(
        *(tuple(data or ()), sequence_length, tokens, tuple(tasks or ()), limit, held_out),
        *(long_context, max_length, questions),
    )
    # What is printed meanwhile is not the answer.
    with redirect_stdout(sys.stderr):
        found = evaluate(model, parent, asked)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_tables(show_evaluation(found))


@app.command("judge")
def judge_command(
    child: Annotated[
        Path, typer.Argument(metavar="CHILD", help="A run folder (its child against its parent) or a checkpoint.")
    ],
    questions: Annotated[Path, typer.Option(help="JSON lines with `question`, or a text file, one question a line.")],
    parent: Annotated[Path | None, typer.Option(help="A checkpoint. Default: a run's own.")] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model at that endpoint.")] = None,
    person: Annotated[bool, typer.Option("--person", help="You judge, here in the terminal.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    out: Annotated[
        Path | None,
        typer.Option(help="Where answers and votes are kept, to continue later. Default: RUN/evaluations/judged.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a model or a person judge the answers of child and parent, unnamed and in both orders.

    The questions and answers are sent to the endpoint that you name. If OPENAI_API_KEY is set, it is sent along.
    """
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.evaluation.judge import Endpoint, Person, judge_child, show_judgement

    if person == (judge is not None) or (judge is None) != (model is None):
        raise RecipeError("Say who judges: --judge URL --model NAME, or --person.")
    who = Person() if judge is None or model is None else Endpoint(judge, model)
    with redirect_stdout(sys.stderr):
        found = judge_child(child, parent, questions, who, max_new_tokens, out)
    print(json.dumps(found, indent=1) if as_json else show_judgement(found))
