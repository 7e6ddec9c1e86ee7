"""The three stages on film reviews: imitate reviews, learn what people prefer, write what they would."""
