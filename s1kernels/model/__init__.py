"""The model: its shape (`config`), its tensors (`weights`), its meaning (`dual_ar`), its files (`checkpoint`)."""
