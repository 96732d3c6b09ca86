"""The whole of kilodelta on a real model, offline: a task, a teacher, and every step after them."""
