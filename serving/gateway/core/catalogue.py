"""The models that a gateway serves by name: those that groups run, and their adapters, which come and go."""

from collections.abc import Iterator, Mapping, Sequence

from serving.contracts.models import AdapterCard, ModelCard


class Catalogue(Mapping[str, ModelCard]):
    """By name. An adapter's card is its model's as that is now, but for what is its own."""

    def __init__(self, cards: Sequence[ModelCard], adapters: Sequence[AdapterCard] = ()) -> None:
        self._bases = {card.name: card for card in cards}
        self._adapters: dict[str, AdapterCard] = {}
        self.set_adapters(adapters)

    def set_base(self, card: ModelCard) -> None:
        """Replace the card of a model that groups run."""
        self._bases[card.name] = card

    def forget_base(self, name: str) -> None:
        """It is not served any more, and so its adapters are not."""
        del self._bases[name]
        self._adapters = {other: card for other, card in self._adapters.items() if card.parent != name}

    @property
    def bases(self) -> dict[str, ModelCard]:
        """Models that groups run, by name."""
        return dict(self._bases)

    def set_adapters(self, adapters: Sequence[AdapterCard]) -> None:
        """These, and no others. One whose model is not served, or whose name is a model's, is left out."""
        self._adapters = {
            adapter.name: adapter
            for adapter in adapters
            if adapter.parent in self._bases and adapter.name not in self._bases
        }

    def __getitem__(self, name: str) -> ModelCard:
        adapter = self._adapters.get(name)
        return self._bases[name] if adapter is None else self._bases[adapter.parent].with_adapter(adapter)

    def __iter__(self) -> Iterator[str]:
        yield from self._bases
        yield from self._adapters

    def __len__(self) -> int:
        return len(self._bases) + len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._bases or name in self._adapters
