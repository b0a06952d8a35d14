"""A teacher that ran once: the final states of every labelled token in files, exact at every temperature."""
