"""Backends run whole passes of a tower in the reference's place: `protocol` says what one offers, `choose` picks."""
