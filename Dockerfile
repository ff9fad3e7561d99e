# One image for coordinator and nodes: the arguments of `docker run isthmus` are those of `isthmus`. docker-compose.yml
# uses it for both. torch is the CPU build; to take another one, build with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY netem netem
COPY coordinator coordinator
COPY node node
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    ISTHMUS_CACHE=/isthmus/cache
# A new volume takes the owner of the folder on which it is mounted first, so both folders belong to the user.
RUN useradd --create-home --uid 1000 isthmus \
    && mkdir -p /isthmus/outputs /isthmus/cache \
    && chown -R isthmus:isthmus /isthmus
WORKDIR /isthmus

# What changes least is installed first, so that Docker can reuse its layers: torch, then the other dependencies, then
# Isthmus.
COPY constraints.txt ./
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt torch
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['data'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
COPY configs configs

USER isthmus
ENTRYPOINT ["isthmus"]
CMD ["--help"]
