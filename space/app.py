"""The page as a Hugging Face Space, which listens on port 7860 of all addresses."""

from hf_binaryformer.app.serve import serve

if __name__ == "__main__":
    serve(host="0.0.0.0", port=7860)
