"""How a frozen network is computed without full-size intermediates; :mod:`.choose` decides."""
