"""The mathematics: pure functions of tensors in short PyTorch, one file per family. They know no backend."""
