"""A process that asks a teacher for many answers, over a ledger; to be killed at any moment.

    python ledger_job.py LEDGER BILLS CALLS

What the teacher bills is a line of the file BILLS, written as a server elsewhere would: whatever happens to us.
"""

import os
import sys
import time

from firm_jax.curation.ledger import Cost, Ledger, call_key


def key_of(number: int) -> str:
    fields = {"number": str(number)}
    return call_key(stage="s", version=1, template="t", model="m", parameters={}, images=[], fields=fields)


def cost_of(number: int) -> Cost:
    return Cost(10 + number, number, 1000 * number + 7)


def main(path: str, bills: str, calls: int) -> None:
    ledger = Ledger(path)
    sheet = os.open(bills, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    print("ready", flush=True)
    for number in range(calls):
        key = key_of(number)
        if ledger.answered(key):
            continue
        ledger.begin(key, stage="s", model="m", most=Cost(100, 100, 10**6))
        os.write(sheet, f"{number}\n".encode())
        time.sleep(0.002)
        ledger.settle(key, cost_of(number), outcome="ok", done=True, answer=f"the answer {number}", latency=0.002)
    ledger.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
