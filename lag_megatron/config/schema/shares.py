"""A whole number cut into whole parts."""


def shares(total: int, parts: int, *, alpha: float) -> list[int]:
    """``total`` cut into whole parts that grow as ``i^alpha``; they add up to it exactly."""
    weights = [number**alpha for number in range(1, parts + 1)]
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(parts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
