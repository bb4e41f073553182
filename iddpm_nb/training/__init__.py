"""What a run needs beside the mathematics: files that survive, checkpoints, configuration, speed, memory."""
