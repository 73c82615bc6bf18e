"""Stage 1 without Ray: plan the rows, read and decode images, run the teacher, commit a shard.

The way of an image from its tar to its Status (cache_schemas.embedding_store lists them), and who decides which:

    plan.open_or_plan                 makes it a row of the plan, a cache_schemas.plan.PlannedImage
    encode_shard.encode_shard         one shard's work; it calls encode_rows.encode_rows, which asks a loader
    image_loader.read_planned_image   CRASHED, as found by crashing_images; else what the next line gives
    sources.read_image.read_image     MISSING, TRUNCATED; TOO_LARGE by bytes; UNDECODABLE for a damaged table or base64
    images.decode                     EMPTY, UNDECODABLE; TOO_LARGE by pixels; raised as a DecodeError
    image_loader.or_reason            catches it; TOO_LARGE where memory ran out
    encode_rows.ShardData.fail        writes status and reason; NOT_FINITE where the teacher's embedding is not valid
    permanent_failures                refuses to commit failures that may be the storage's
    store.commit                      keeps counts and reasons, which `dimefm info STORE --failures` lists
"""
