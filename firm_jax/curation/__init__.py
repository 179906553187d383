"""Training data for critics, made by teachers: calls that are paid once, answers that are kept, records selected."""
