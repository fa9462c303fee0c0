"""In which order the products over every datum's own gradient are taken: multiply-adds, counted."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Lengths of the axes of rows: x (n, shared, d_in) and g (n, shared, vectors, d_out)."""

    shared: int
    vectors: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Order:
    """The order in which a sum over data is computed.

    Attributes:
        name: What goes first, in words.
        x_first, g_first: Whether rows are multiplied by the factor before they meet.
        forms: Whether every datum's own gradient is formed.
        cost: Multiply-adds for one datum of one group, all vectors.
        others: Those of the other orders, by name.
    """

    name: str
    x_first: bool
    g_first: bool
    forms: bool
    cost: int
    others: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        others = "; ".join(f"{name}: {cost:.1e}" for name, cost in self.others)
        return f"{self.name}: {self.cost:.1e}" + (f" ({others})" if others else "")

    def at_once(self, sizes: Sizes, group: int, largest: int) -> tuple[int, int]:
        """How many data and vectors of a group's rows together hold no more than so many numbers.

        One of each at least.
        """
        S, V, i, o = sizes.shared, sizes.vectors, sizes.d_in, sizes.d_out
        of_x = S * i
        of_vector = S * o + (i * o if self.forms else 0)
        vectors = min(V, max(1, largest // max(group * of_vector, 1)))
        return max(1, largest // max(group * (of_x + vectors * of_vector), 1)), vectors


NAMES = {
    (True, True): "x Q_A and g Q_B, then Σ_s",
    (True, False): "x Q_A, then Σ_s, then Q_B",
    (False, True): "g Q_B, then Σ_s, then Q_A",
    (False, False): "Σ_s x gᵀ, then Q_A and Q_B",
}


def order_of_squares(sizes: Sizes) -> Order:
    """For (Q_Aᵀ G Q_B)²: turn x, or G, by Q_A; and g, or G, by Q_B: whichever has fewer rows.

    Without shared axes G is x gᵀ, and the sum over data is ((x Q_A)²)ᵀ (g Q_B)².
    """
    S, V, i, o = sizes.shared, sizes.vectors, sizes.d_in, sizes.d_out
    if S == 1:
        cost = i * i + V * o * o + i * o
        return Order("((x Q_A)²)ᵀ (g Q_B)²", True, True, False, cost)
    orders = [
        Order(NAMES[x_first, g_first], x_first, g_first, True, S * i * V * o + of_x + of_g)
        for x_first, of_x in ((True, S * i * i), (False, V * i * i * o))
        for g_first, of_g in ((True, V * S * o * o), (False, V * i * o * o))
    ]
    return _cheapest(orders)


def order_of_products(sizes: Sizes) -> Order:
    """For G B Gᵀ and Gᵀ A G: form G, or only products of rows with rows, g B gᵀ or x A xᵀ."""
    S, V, i, o = sizes.shared, sizes.vectors, sizes.d_in, sizes.d_out
    of_rows = S * (i * i + V * o * o) + S * S * (i + V * o)
    rows = Order("rows with rows", True, True, False, of_rows)
    formed = Order("Σ_s x gᵀ", False, False, True, V * i * o * (S + i + o))
    return _cheapest([rows, formed])


def order_by_token(sizes: Sizes) -> Order:
    """For one-hot inputs there is but one: G has few rows that are not zero."""
    cost = sizes.shared * sizes.vectors * sizes.d_out**2
    return Order("Σ of g over equal tokens", False, False, False, cost)


def order_of_sums(sizes: Sizes) -> Order:
    """Where G is a sum over several kinds of rows: it is formed, then comes either factor."""
    S, V, i, o = sizes.shared, sizes.vectors, sizes.d_in, sizes.d_out
    return Order("Σ of all terms' x gᵀ", False, False, True, V * i * o * (S + i + o))


def _cheapest(orders: list[Order]) -> Order:
    best = min(orders, key=lambda order: order.cost)
    return replace(best, others=tuple((o.name, o.cost) for o in orders if o is not best))
