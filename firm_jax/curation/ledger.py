"""What teachers were asked, what they answered and what it cost: one row a call, kept through kills and power failures.

A call is named by all that decides its answer, so that asking again finds the answer, and a changed prompt is another
call. Money and tokens are counted in the same transaction that keeps the answer. A try that a kill interrupts may have
been billed or not: it counts as lost, at the most that it may have cost.

An answer is forced to the disk before anyone is told of it. That a try begins is only handed to the operating system,
which outlives a process that is killed; the next answer forces it to the disk too. So it is one forced write a try, and
a power failure, unlike a kill, can take with it that the last few tries were on their way: at most those begun since
the last answer, which are then asked again without counting as lost.
"""

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from firm_jax.errors import BudgetError, ConfigError, WorkdirError

VERSION = 1
BILLION = 1_000_000_000

_SCHEMA = f"""
CREATE TABLE calls (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('open', 'done', 'failed')),
    outcome TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '', answer TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL, latency REAL NOT NULL DEFAULT 0,
    tokens_in INTEGER NOT NULL DEFAULT 0, tokens_out INTEGER NOT NULL DEFAULT 0, price INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0, lost_tokens INTEGER NOT NULL DEFAULT 0, lost_price INTEGER NOT NULL DEFAULT 0,
    in_flight INTEGER NOT NULL, most_tokens INTEGER NOT NULL, most_price INTEGER NOT NULL
);
PRAGMA user_version = {VERSION};
"""


def call_key(
    *,
    stage: str,
    version: int,
    template: str,
    model: str,
    parameters: Mapping,
    images: Sequence[str],
    fields: Mapping[str, str],
) -> str:
    """sha256, in hexadecimal, of all that decides an answer.

    images: the hash of each image shown, in order. fields: what the template is filled with, answers of earlier stages
    among it. The order of names in mappings does not matter.
    """
    named = [stage, version, template, model, dict(parameters), list(images), dict(fields)]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cost:
    """tokens_in, tokens_out: of prompt and answer. price: in billionths of the currency, so that sums are exact."""

    tokens_in: int = 0
    tokens_out: int = 0
    price: int = 0


@dataclass(frozen=True)
class Budget:
    """The most that a ledger may cost over all runs, lost tries included. None: without limit.

    money: in the currency of the prices. tokens: of prompts and answers together. Raises ConfigError for others than
    numbers above 0.
    """

    money: float | None = None
    tokens: int | None = None

    def __post_init__(self):
        for name in ("money", "tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"budget.{name} is {value}; give a number above 0, or None for no limit")


@dataclass(frozen=True)
class Answered:
    """A row that is done. outcome: "ok", or why the answer is of no use; answer: the text as it came."""

    outcome: str
    answer: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger. calls: rows; done: those answered; attempts: tries begun; price: billionths of the currency.

    lost: tries whose cost is not known, which count with the most that they may have cost (lost_tokens, lost_price).
    """

    calls: int
    done: int
    attempts: int
    tokens_in: int
    tokens_out: int
    price: int
    lost: int
    lost_tokens: int
    lost_price: int

    @property
    def money(self) -> float:
        """What was paid and what may have been, in the currency of the prices."""
        return (self.price + self.lost_price) / BILLION

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out + self.lost_tokens


class Ledger:
    """The ledger in one SQLite file, made if it is not there; to be used in one thread.

    One process holds it; the file system frees it when that one dies, however it does. Raises WorkdirError when another
    process holds it, the file is no ledger of this version, or the disk does not take what is written.
    """

    def __init__(self, path, budget: Budget | None = None):
        self.path, self.budget = Path(path), budget or Budget()
        with self._told():
            self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            with self._told():
                self._open()
        except BaseException:
            self._database.close()
            raise
        totals = self.totals()
        self._tokens, self._price = totals.tokens, totals.price + totals.lost_price  # those in flight included

    def _open(self) -> None:
        # Exclusive from the first access on: a second process is refused, and no shared memory is needed, which
        # network file systems do not have.
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("PRAGMA journal_mode = WAL")
        with self._transaction():
            [version] = self._database.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                for statement in _SCHEMA.split(";\n"):
                    self._database.execute(statement)
            elif version != VERSION or "calls" not in tables:
                raise WorkdirError(
                    f"{self.path} is no ledger of version {VERSION} (it has the tables {', '.join(sorted(tables))}, "
                    f"version {version}); choose another file or another --workdir"
                )
            # What was on its way when the last process ended.
            self._database.execute(
                "UPDATE calls SET in_flight = 0, lost = lost + 1, lost_tokens = lost_tokens + most_tokens, "
                "lost_price = lost_price + most_price WHERE in_flight = 1"
            )

    def close(self) -> None:
        with self._told():
            self._database.close()

    def answered(self, key: str) -> Answered | None:
        """The answer of a call that is done, None for one that is to be asked."""
        found = self._one("SELECT outcome, answer, reason FROM calls WHERE key = ? AND status = 'done'", key)
        return Answered(*found) if found else None

    def begin(self, key: str, *, stage: str, model: str, most: Cost) -> None:
        """A try begins, which costs `most` at the most. To be called before it is sent. A kill does not undo it.

        Raises BudgetError when it could exceed the budget; ValueError for a call that is done or on its way.
        """
        tokens = most.tokens_in + most.tokens_out
        self._check_budget(tokens, most.price)
        with self._told(), self._transaction(forced=False):
            changed = self._database.execute(
                "INSERT INTO calls (key, stage, model, status, attempts, in_flight, most_tokens, most_price) "
                "VALUES (?, ?, ?, 'open', 1, 1, ?, ?) ON CONFLICT (key) DO UPDATE SET status = 'open', "
                "attempts = attempts + 1, in_flight = 1, most_tokens = excluded.most_tokens, "
                "most_price = excluded.most_price WHERE status <> 'done' AND in_flight = 0",
                (key, stage, model, tokens, most.price),
            ).rowcount
            if changed != 1:
                raise ValueError(f"the call {key} is done or on its way: it must not be asked again")
        self._tokens += tokens
        self._price += most.price

    def settle(
        self, key: str, cost: Cost | None, *, outcome: str, done: bool, answer: str = "", reason: str = "", latency=0.0
    ) -> None:
        """The try that was begun has ended, and cost so much; None where that cannot be known. It is then on the disk.

        done: whether there is an answer, which is then kept for good; if not, the call may be asked again. latency:
        seconds. ValueError for a call that is not on its way.
        """
        cost, lost = cost or Cost(), cost is None
        with self._told(), self._transaction():
            row = self._one("SELECT most_tokens, most_price FROM calls WHERE key = ? AND in_flight = 1", key)
            if row is None:
                raise ValueError(f"the call {key} is not on its way: nothing of it can be settled")
            tokens, price = row
            self._database.execute(
                "UPDATE calls SET in_flight = 0, status = ?, outcome = ?, answer = ?, reason = ?, latency = ?, "
                "tokens_in = tokens_in + ?, tokens_out = tokens_out + ?, price = price + ?, "
                "lost = lost + ?, lost_tokens = lost_tokens + ?, lost_price = lost_price + ? WHERE key = ?",
                (
                    *("done" if done else "failed", outcome, answer, reason, latency),
                    *(cost.tokens_in, cost.tokens_out, cost.price),
                    *(int(lost), tokens * lost, price * lost, key),
                ),
            )
        if not lost:
            self._tokens += cost.tokens_in + cost.tokens_out - tokens
            self._price += cost.price - price

    def totals(self) -> Totals:
        sums = ("status = 'done'", "attempts", "tokens_in", "tokens_out", "price", "lost", "lost_tokens", "lost_price")
        columns = ", ".join(f"coalesce(sum({column}), 0)" for column in sums)
        return Totals(*self._one(f"SELECT count(*), {columns} FROM calls"))

    def rows(self) -> Iterator[dict]:
        """Every row by name of its columns, in the order of the keys."""
        with self._told():
            found = self._database.execute("SELECT * FROM calls ORDER BY key")
            names = [column[0] for column in found.description]
            yield from (dict(zip(names, row, strict=True)) for row in found)

    def _check_budget(self, tokens: int, price: int) -> None:
        most_tokens, most_money = self.budget.tokens, self.budget.money
        if most_tokens is not None and self._tokens + tokens > most_tokens:
            self._stop("tokens", f"{self._tokens} tokens", f"{tokens}", f"{most_tokens}")
        if most_money is not None and self._price + price > most_money * BILLION:
            self._stop("money", f"{self._price / BILLION:.6g}", f"{price / BILLION:.6g}", f"{most_money:.6g}")

    def _stop(self, name: str, spent: str, more: str, most: str) -> None:
        raise BudgetError(
            f"{spent} are spent or on their way, and the next call may cost {more} more, which could exceed "
            f"budget.{name} = {most}. All answers are kept in {self.path}: raise the budget and start the same command "
            "again, or take what there is."
        )

    def _one(self, query: str, *values):
        with self._told():
            return self._database.execute(query, values).fetchone()

    @contextlib.contextmanager
    def _transaction(self, forced: bool = True) -> Iterator[None]:
        """forced: to the disk, with all before it, when it ends; if not, the operating system does so in its time."""
        self._database.execute(f"PRAGMA synchronous = {'FULL' if forced else 'NORMAL'}")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors, with the file and what can be done."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise WorkdirError(
                    f"the ledger {self.path} is in use by another process. Wait for it or stop it, or choose another "
                    "--workdir: two that share a ledger could pay twice."
                ) from error
            raise WorkdirError(
                f"the ledger {self.path} cannot be used: {error}. Make sure that it is a ledger and that its disk can "
                "be written and has free space, then start the same command again: what was answered is kept."
            ) from error
