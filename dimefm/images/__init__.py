"""From encoded bytes to pixels: decoding, preprocessing, crops, small JPEGs."""
