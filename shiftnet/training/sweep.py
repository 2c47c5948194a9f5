"""Searches the settings of a recipe, by optuna, for the best accuracy on held-out images."""

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftnet import config as config_lib
from shiftnet.config import FIELDS, Config
from shiftnet.errors import NotTrainable, UserError, say, unknown
from shiftnet.files import path_of, write_atomically
from shiftnet.training import metrics
from shiftnet.training.deadline import Deadline
from shiftnet.training.engine import train
from shiftnet.training.restore import Init
from shiftnet.training.workdir import lock

STUDY, TRIALS, LOCK, SPACE = "study.journal", "trials.json", "lock", "space.json"
STARTUP = 5  # trials that end before any is pruned (optuna's default)
# What images there are, and which of them are held out.
IMAGES = tuple(
    f"data.{field}" for field in ("name", "source", "dir", "url", "sha256", "validation")
)


@dataclasses.dataclass(frozen=True)
class Values:
    """The values to try of one field: a list, or a range.

    Attributes:
      field: its dotted name.
      texts: the list, as one would type them; empty for a range.
      low, high: the ends of the range, of the field's own type.
      log: whether the range is searched on a logarithmic scale.
    """

    field: str
    texts: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @classmethod
    def parse(cls, text: str) -> "Values":
        """Reads `FIELD=A,B,...`, `FIELD=LOW..HIGH` or `FIELD=LOW..HIGH:log`.

        Raises:
          UserError: for another form, an unknown field, or a value that the field does not take.
        """
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--over must be FIELD=VALUES, found {text!r}")
        if field not in FIELDS:
            raise unknown("field", field, FIELDS)
        if match := re.fullmatch(r"([^,]+?)\.\.([^,]+?)(:log)?", values):
            return cls._range(field, match[1], match[2], match[3] is not None)
        texts = tuple(part.strip() for part in re.split(r",(?![^(]*\))", values))
        known = {repr(FIELDS[field].check(FIELDS[field].parse(value))) for value in texts}
        if len(known) < len(texts):
            raise UserError(f"--over {field} has a value twice: {values}")
        return cls(field, texts)

    @classmethod
    def _range(cls, field: str, low: str, high: str, log: bool) -> "Values":
        kind = FIELDS[field].kind
        if kind not in (int, float):
            raise UserError(f"--over {field} takes a list of values: a range is one of numbers")
        first, last = (FIELDS[field].check(FIELDS[field].parse(end)) for end in (low, high))
        if not first < last or (log and first <= 0):
            rule = "rise, from above 0" if log else "rise"
            raise UserError(f"--over {field}: a range must {rule}, found {low}..{high}")
        return cls(field, (), first, last, log)

    def suggest(self, trial: Any) -> str:
        """Asks an optuna trial for a value; returns it as text."""
        if self.texts:
            return str(trial.suggest_categorical(self.field, list(self.texts)))
        suggest = trial.suggest_int if FIELDS[self.field].kind is int else trial.suggest_float
        return repr(suggest(self.field, self.low, self.high, log=self.log))


@dataclasses.dataclass(frozen=True)
class Options:
    """What to search, and how far.

    Attributes:
      config: the recipe, which holds out validation images.
      space: the values of each field that is searched.
      workdir: has the study and a directory for each trial.
      trials: how many in all, those of earlier sessions included.
      seeds: that each trial trains, in one program.
      prune: whether trials that fall behind are ended early.
      init: the network that every trial starts from; None for a fresh one.
      find: gives the path of a teacher, see `train`.
    """

    config: Config
    space: Sequence[Values]
    workdir: Path
    trials: int
    seeds: int = 1
    prune: bool = True
    init: Init | None = None
    find: Callable[[str, str], Path] = path_of

    @property
    def combinations(self) -> int | None:
        """How many there are of the values; None where one of them is a range."""
        lists = [len(values.texts) for values in self.space]
        return math.prod(lists) if all(lists) else None


def run(options: Options, deadline: Deadline) -> int:
    """Trains trials until there are as many as asked for; returns the exit code.

    Where all values are lists, every combination is tried once, in their order; else optuna's
    sampler proposes them. Trials are judged by the mean over the seeds of the validation accuracy
    after the last epoch. A trial that was interrupted goes on where it was.

    Raises:
      UserError: where optuna is missing, no images are held out, a value does not fit the recipe,
        or the directory has another sweep.
    """
    optuna = _optuna()
    check(options)
    options.workdir.mkdir(parents=True, exist_ok=True)
    with lock(options.workdir / LOCK, options.workdir):
        is_new = _check_same(options)
        study = _study(optuna, options)
        code, trials = 0, min(options.trials, options.combinations or options.trials)
        while not code and _count(optuna, study) < trials:
            if deadline.left_for_another <= 0:
                print("no time is left")
                break
            try:
                code, finished = _trial(optuna, study, options, deadline)
            except UserError:
                if is_new:  # nothing was trained, and the directory would refuse other values
                    for name in (SPACE, STUDY):
                        (options.workdir / name).unlink(missing_ok=True)
                raise
            _write(options.workdir, study)
            if not finished:
                break
        print(table(study))
        return code


def check(options: Options) -> None:
    """Checks that every value can be trained.

    Raises:
      UserError: where one cannot.
    """
    if not options.config.data.validation:
        raise UserError(
            "data.validation is 0: a sweep chooses on held-out images, never on the test set; "
            "give for example --config.data.validation=5000"
        )
    for values in options.space:
        if values.field in ("seed", *IMAGES):
            raise UserError(f"--over {values.field} would compare accuracies of different images")
        for text in values.texts or (repr(values.low), repr(values.high)):
            own = configured(options.config, {values.field: text})
            _check_effect(own, values.field, [one for one in options.space if one is not values])


def _check_effect(config: Config, field: str, others: Sequence[Values]) -> None:
    """Checks that a field's value is not ignored, with some value of another field at least.

    Raises:
      UserError: where it is.
    """
    rest = config_lib.FIELDS.keys() - {field}
    found = None
    for values in [{}, *({other.field: text} for other in others for text in other.texts)]:
        try:
            config_lib.check_effects(configured(config, values), allowed=rest)
            return
        except UserError as error:
            found = found or error
    assert found
    raise found


def configured(config: Config, values: Mapping[str, str]) -> Config:
    """Returns a copy of a recipe with some fields set, as texts.

    Raises:
      UserError: where that is no valid recipe.
    """
    own = config_lib.from_json(config_lib.to_json(config))
    for field, text in values.items():
        config_lib.override(own, field, text)
    config_lib.validate(own)
    return own


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a sweep needs the package optuna: pip install 'shiftnet[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check_same(options: Options) -> bool:
    """Keeps the search's recipe and space in its directory.

    Returns:
      Whether it had none.

    Raises:
      UserError: where it has others.
    """
    path = options.workdir / SPACE
    now = {
        "config": options.config.to_dict(),
        "space": [dataclasses.asdict(values) for values in options.space],
        "seeds": options.seeds,
    }
    if options.init:
        now["init"] = {**dataclasses.asdict(options.init), "path": str(options.init.path)}
    text = json.dumps(now, indent=1) + "\n"
    if path.exists():
        if path.read_text() != text:
            raise UserError(
                f"{options.workdir} has another sweep, see {path.name} there: take another "
                "--workdir, or the same recipe, values and seeds"
            )
        return False
    write_atomically(path, text)
    return True


def _study(optuna: Any, options: Options) -> Any:
    """Opens the study, with every combination in its queue where there are lists alone."""
    backend = optuna.storages.journal.JournalFileBackend(str(options.workdir / STUDY))
    storage = optuna.storages.JournalStorage(backend)
    epochs = options.config.epochs
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=epochs // 5)
        if options.prune
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )
    # Another seed in every session, or its first trials would be those of the first one.
    study.sampler = optuna.samplers.TPESampler(seed=options.config.seed + len(study.trials))
    if options.combinations:
        fields = [values.field for values in options.space]
        for texts in itertools.product(*(values.texts for values in options.space)):
            study.enqueue_trial(dict(zip(fields, texts, strict=True)), skip_if_exists=True)
    return study


def _count(optuna: Any, study: Any) -> int:
    """Counts the trials that are over."""
    states = optuna.trial.TrialState
    return len(study.get_trials(states=[states.COMPLETE, states.PRUNED]))


def _folder(number: int) -> str:
    return f"trial{number:04}"


def _trial(optuna: Any, study: Any, options: Options, deadline: Deadline) -> tuple[int, bool]:
    """Trains one trial; returns the exit code, 0 to go on, and whether the trial is over."""
    states = optuna.trial.TrialState
    interrupted = study.get_trials(states=[states.RUNNING])  # by the session before
    trial = optuna.Trial(study, interrupted[0]._trial_id) if interrupted else study.ask()
    known = set(interrupted[0].intermediate_values if interrupted else ())  # epochs
    folder = _folder(trial.number)
    texts = {values.field: values.suggest(trial) for values in options.space}
    workdir = options.workdir / folder
    print(f"{folder}: {_words(texts)}", flush=True)
    pruned = False

    def report(lines: Sequence[Mapping[str, Any]]) -> None:
        if lines[0]["epoch"] not in known:  # an epoch that is trained again gives the same
            known.add(lines[0]["epoch"])
            trial.report(_accuracy(lines), lines[0]["epoch"])

    def stop(lines: Sequence[Mapping[str, Any]]) -> bool:
        nonlocal pruned
        report(lines)
        pruned = trial.should_prune()
        return pruned

    first = options.config.seed
    seeds = None if options.seeds == 1 else range(first, first + options.seeds)
    places = [workdir] if seeds is None else [workdir / f"seed{seed}" for seed in seeds]
    for lines in zip(*(metrics.read_sound(place)[0] for place in places), strict=False):
        if "validation_accuracy" in lines[0]:  # of an earlier session
            report(lines)
    try:
        outcome = train(
            configured(options.config, texts),
            workdir,
            init=options.init,
            seeds=seeds,
            deadline=deadline,
            stop=stop,
            find=options.find,
        )
    except (NotTrainable, UserError) as error:
        # A value can be impossible only for these images. That nothing can be trained at all
        # shows in the first trial.
        if isinstance(error, UserError) and not _count(optuna, study):
            raise
        say(f"{folder}: {error}", 1)
        study.tell(trial, state=states.PRUNED)
        return 0, True
    if outcome.finished:
        last = [metrics.read(place)[-1] for place in places]
        study.tell(trial, _accuracy(last))
        print(f"{folder}: validation accuracy {_accuracy(last):.2%}", flush=True)
    elif pruned:
        study.tell(trial, state=states.PRUNED)
        print(f"{folder}: ended early, it had fallen behind", flush=True)
    else:  # out of time, or interrupted: the next session goes on
        print(f"{folder}: stopped after step {outcome.step}; the same command continues it")
    return (128 + outcome.signal if outcome.signal else 0), outcome.finished or pruned


def _accuracy(lines: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(line["validation_accuracy"] for line in lines)


def _words(params: Mapping[str, Any]) -> str:
    return "  ".join(f"{field}={value}" for field, value in params.items())


def found(study: Any) -> list[dict[str, Any]]:
    """Lists the trials that are over, the best first, as `trials.json` has them."""
    trials = [
        {
            "folder": _folder(trial.number),
            "state": trial.state.name.lower(),
            "validation_accuracy": trial.value if trial.state.name == "COMPLETE" else None,
            "epochs": max(trial.intermediate_values, default=0),
            "params": trial.params,
        }
        for trial in study.get_trials()
        if trial.state.name in ("COMPLETE", "PRUNED")
    ]
    return sorted(trials, key=lambda one: -(one["validation_accuracy"] or -1))


def _write(workdir: Path, study: Any) -> None:
    write_atomically(workdir / TRIALS, json.dumps(found(study), indent=1) + "\n")


def table(study: Any) -> str:
    """Lists the trials that are over, a line each, the best first."""
    lines = []
    for one in found(study):
        accuracy = one["validation_accuracy"]
        result = f"{accuracy:.2%}" if accuracy is not None else f"epoch {one['epochs']}"
        lines.append(f"{one['folder']}  {result:>9}  {_words(one['params'])}")
    return "\n".join(["trial      validation  values", *lines]) if lines else "no trial is over yet"
