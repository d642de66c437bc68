# Mantlet's image: both binaries and Envoy. `make image` makes one with the same layout without a daemon.
#   docker build -t registry.example/mantlet:VERSION .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS TARGETARCH
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -o /out/ ./cmd/mantlet ./cmd/mantlet-agent

# Envoy at /usr/local/bin/envoy, with the shared libraries that it needs and nothing else.
FROM envoyproxy/envoy:distroless-v1.40.0
COPY --from=build /out/mantlet /out/mantlet-agent /usr/local/bin/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/mantlet"]
CMD []
