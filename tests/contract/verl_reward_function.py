"""A reward function as plain veRL calls it."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1 where the answer is the expected one."""
    return float(solution_str == ground_truth)
