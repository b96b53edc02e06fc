"""The E2E restaurant task: fact sheets, a checker of facts, instructions, a simulated labeler and the data files."""
