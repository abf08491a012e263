# docker build -t pyramidflow . && mkdir -p saveDir  # to be written to by user 1000
# docker run --gpus all -v "$PWD/data:/data:ro" -v "$PWD/saveDir:/app/saveDir" pyramidflow train.py --cls tile --datapath /data
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user && install --directory --owner user /app
WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY *.py *.j2 ./
COPY benchmarks benchmarks
COPY tools tools
COPY paper_tables paper_tables
USER user
ENTRYPOINT ["python"]
CMD ["demo.py"]
