"""Commands around training: plan, doctor, replay, ladder, eval and sample."""
