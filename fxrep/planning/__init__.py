"""From a root to the plan that replaces what leads to it; nothing is changed here."""
