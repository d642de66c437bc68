package relay

// The control plane compresses what it sends to who can read it; gRPC says so for every compressor that is registered.
import _ "google.golang.org/grpc/encoding/gzip"
