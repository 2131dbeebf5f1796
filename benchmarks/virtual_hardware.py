"""What superoffload leaves exposed on hardware of data sheets, in virtual time.

The engine, its plans, states, link and gates are the real ones; only durations are arithmetic
(`tests/helpers/virtual_time.py`), so a run is the same on every machine. Link and host memory reach 80 % of a data
sheet's rate, the device 40 % of its dense bf16 rate. The step is the shortest that is long enough
(`forecast.is_long_enough`), in multiples of 1024 tokens. What it can't show: contention that no data sheet states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_superscale.offload.planner.forecast import StepTimes, best_plan, is_long_enough
from tests.helpers.virtual_steps import simulate

MEMORY_SHARE, DEVICE_SHARE = 0.8, 0.4
NUM_PARAMS = 8e9
# Buckets of 64 MiB of bf16 weights, as "auto" makes them.
NUM_BUCKETS = round(2 * NUM_PARAMS / (64 * 2**20))
CLIP_RATES = (0.0, 0.5, 1.0)
NUM_STEPS = 16
MOST_EXPOSED = 0.01


@dataclass(frozen=True)
class Hardware:
    """Rates of data sheets: of the device in FLOP/s, of each way of its link and of its host's memory in bytes/s."""

    device: float
    link: float
    host: float


HARDWARE = {
    # NVIDIA H100 Tensor Core GPU datasheet: PCIe 756 TFLOPS bf16 dense, PCIe Gen5 x16, 64 GB/s each way. A socket of
    # Intel Xeon 4th generation: eight channels of DDR5-4800, 307 GB/s.
    "H100 PCIe": Hardware(756e12, 64e9, 307e9),
    # The same: SXM 989 TFLOPS. DGX H100 user guide: two such sockets for eight GPUs, so that each has a quarter of one.
    "H100 SXM, an eighth of a DGX": Hardware(989e12, 64e9, 307e9 / 4),
    # NVIDIA GH200 Grace Hopper Superchip datasheet: 990 TFLOPS, NVLink-C2C 900 GB/s both ways. The sheet's "up to
    # 512 GB/s" of LPDDR5X are those of 120 GB, too little for these states; 480 GB reach 384 (`estimation/devices.py`).
    "GH200": Hardware(990e12, 450e9, 384e9),
    # NVIDIA Ada GPU architecture whitepaper: RTX 4090, 165 TFLOPS bf16 dense with fp32 sums; PCIe Gen4 x16, 32 GB/s
    # each way. A desktop's two channels of DDR5-5600, 90 GB/s.
    "RTX 4090": Hardware(165e12, 32e9, 90e9),
}


def times_of(hardware: Hardware, tokens: int) -> StepTimes:
    """Seconds of a step's parts: 2 FLOPs per parameter and token forward and 4 backward, 30 bytes of the host."""
    forward = 2 * NUM_PARAMS * tokens / (DEVICE_SHARE * hardware.device)
    link = 2 * NUM_PARAMS / (MEMORY_SHARE * hardware.link)
    host = 30 * NUM_PARAMS / (MEMORY_SHARE * hardware.host)
    return StepTimes(forward, 2 * forward, link, host, link, NUM_BUCKETS)


def enough_tokens(hardware: Hardware) -> int:
    """Tokens of the shortest step that is long enough."""
    return next(tokens for tokens in range(1024, 2**22, 1024) if is_long_enough(times_of(hardware, tokens)))


def virtual_report() -> dict[str, Any]:
    """Rows and checks of all hardware at all clip rates; prints the table."""
    rows, checks = [], []
    print(
        f"\nvirtual time, {NUM_PARAMS / 1e9:.0f}B parameters in {NUM_BUCKETS} buckets, shortest steps that hide all\n"
    )
    print(
        f"{'':32}{'tokens':>8}{'step s':>8}{'host s':>8}{'link s':>8}{'clipped':>9}{'exposed':>9}  plan by the forecast"
    )
    for name, hardware in HARDWARE.items():
        tokens = enough_tokens(hardware)
        times = times_of(hardware, tokens)
        passes = times.forward + times.backward
        for rate in CLIP_RATES:
            share = simulate(times, None, rate, NUM_STEPS)[0] / passes
            plan = best_plan(times, rate)
            print(
                f"{name:32}{tokens:8}{passes:8.2f}{times.host:8.2f}{times.d2h:8.2f}{rate:9.0%}{share:9.2%}  {plan}",
                flush=True,
            )
            row = {
                "hardware": name,
                "tokens": tokens,
                "clip_rate": rate,
                "exposed_share": round(share, 5),
                "plan": plan,
            }
            rows.append(row)
            check = {"check": f"virtual {name}, {rate:.0%} clipped: exposed share", "limit": MOST_EXPOSED}
            checks.append(check | {"measured": round(share, 5), "met": share <= MOST_EXPOSED})
    return {"virtual": rows, "checks": checks}
