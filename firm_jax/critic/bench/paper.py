"""What the paper reports on FIRM-Bench (arXiv 2603.12247, tables 1 and 2): mean absolute errors, not measured here."""

COLUMNS = {"edit": ("execution", "consistency", "overall"), "gen": ("easy", "hard", "overall")}
TABLES = {
    "edit": {
        "GPT-4o": (0.73, 1.16, 0.93),
        "GPT-4.1": (0.74, 1.04, 0.88),
        "GPT-5": (0.62, 0.73, 0.67),
        "Gemini-3-pro": (0.54, 0.57, 0.55),
        "InternVL3.5-8B": (0.90, 1.13, 1.00),
        "InternVL3.5-38B": (0.85, 1.22, 1.02),
        "InternVL3.5-241B-A28": (0.69, 1.05, 0.86),
        "Qwen3-VL-8B": (0.66, 1.12, 0.87),
        "Qwen3-VL-32B": (0.69, 1.14, 0.90),
        "Qwen3-VL-235B-A22": (0.72, 0.91, 0.81),
        "FIRM-Edit-8B": (0.53, 0.73, 0.62),
    },
    "gen": {
        "GPT-4o": (0.63, 0.66, 0.65),
        "GPT-4.1": (0.58, 0.69, 0.64),
        "GPT-5": (0.50, 0.53, 0.52),
        "Gemini-3-pro": (0.38, 0.42, 0.40),
        "InternVL3.5-8B": (0.61, 0.55, 0.58),
        "InternVL3.5-38B": (0.79, 0.58, 0.68),
        "InternVL3.5-241B-A28": (0.60, 0.61, 0.60),
        "Qwen3-VL-8B": (0.63, 0.63, 0.63),
        "Qwen3-VL-32B": (0.51, 0.56, 0.54),
        "Qwen3-VL-235B-A22": (0.60, 0.52, 0.56),
        "FIRM-Gen-8B": (0.45, 0.57, 0.51),
    },
}
