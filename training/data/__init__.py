"""What a run reads: the teacher, prompts and images, their encoded conditioning, the order of examples."""
