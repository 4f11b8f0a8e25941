# The image of cwdm: `docker build -t cwdm .`, see README.md.
#
#   --build-arg BASE_IMAGE=…   any image with Python 3.11 or newer, or with apt; PyTorch brings CUDA's libraries itself,
#                              so the base needs no more than the labels that the NVIDIA runtime reads
#   --build-arg WEIGHTS=…      own: what is in workspace/weights; published: downloaded now; bundled: the small ones that
#                              come with cwdm, trained on synthetic brains; auto: own if there are any, else bundled
#   --build-arg SCANS=1        with what raw scans need: cwdm scan, cwdm prepare scans
#   --build-arg CONTRASTS=…    what the weights must synthesise for the build to end well
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS python
# On a GPU Triton compiles its launcher at first use, with a C compiler and Python's headers.
RUN { python3 -c 'import ensurepip, venv' && command -v cc \
        && test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; } >/dev/null 2>&1 \
    || (apt-get update && apt-get install -y --no-install-recommends \
            python3 python3-venv python3-dev gcc libc6-dev ca-certificates \
        && rm -rf /var/lib/apt/lists/*)

FROM python AS build
RUN python3 -m venv /opt/cwdm
ENV PATH=/opt/cwdm/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# A folder wheels/ in the repository, if there is one, is asked before the package index.
COPY requirements*.txt wheel[s] /src/
RUN pip install --find-links /src -r /src/requirements.txt
ARG SCANS=
RUN if [ -n "$SCANS" ]; then \
        pip install --find-links /src -r /src/requirements.txt -r /src/requirements-scans.txt; \
    fi
COPY project /src/project
RUN pip install --no-deps /src/project \
    && pip uninstall --yes pip \
    && find /opt/cwdm -name '*.a' -delete

FROM build AS weights
ARG WEIGHTS=auto
COPY workspace/weights /own
RUN mkdir /weights \
    && case "$WEIGHTS" in \
        own|auto) find /own -mindepth 1 -maxdepth 1 ! -name '.*' -exec mv -t /weights {} + ;; \
        published) cwdm weights download /weights && rm -rf /weights/.cache ;; \
        bundled) ;; \
        *) echo "WEIGHTS=$WEIGHTS: must be auto, own, published or bundled" >&2; exit 1 ;; \
    esac \
    && if [ "$WEIGHTS" = own ] && [ -z "$(ls /weights)" ]; then \
        echo "WEIGHTS=own, but there is nothing in workspace/weights" >&2; exit 1; \
    fi \
    && chmod -R a+rX /weights

FROM python
LABEL org.opencontainers.image.title="cwdm" \
      org.opencontainers.image.description="3D wavelet diffusion: synthesises the missing one of four MR modalities" \
      org.opencontainers.image.licenses="MIT"
# A driver too old for the base must not keep the container from starting: cwdm tries the GPU, and says what is wrong.
# Any user, without a name or a home, on a read-only root: whatever a library wants to keep goes to /tmp.
ENV PATH=/opt/cwdm/bin:$PATH HOME=/tmp USER=cwdm XDG_CACHE_HOME=/tmp/.cache MPLCONFIGDIR=/tmp/.matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/.inductor TRITON_CACHE_DIR=/tmp/.triton \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1 \
    CWDM_WEIGHTS=/weights NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_DISABLE_REQUIRE=1
COPY LICENSE /licenses/cwdm/LICENSE
COPY --from=build /opt/cwdm /opt/cwdm
COPY --from=weights /weights /weights
USER 10001:10001
WORKDIR /tmp
ARG CONTRASTS="t1n t1c t2w t2f"
RUN cwdm-container self-test $(printf -- '--modality %s ' $CONTRASTS)
ENTRYPOINT ["cwdm-container"]
