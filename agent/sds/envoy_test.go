package sds

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envoyBinary finds the real Envoy. Without it the test fails: what it shows cannot be shown otherwise.
func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("MANTLET_ENVOY")
	if path == "" {
		path = filepath.Join("..", "..", ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Envoy: $MANTLET_ENVOY is not set or wrong, and %v; run: make envoy", err)
	}
	return path
}

// envoy is a running Envoy with one TLS listener that echoes, its secrets by SDS over a unix socket.
type envoy struct {
	t     *testing.T
	admin http.Client
	addr  string // of the listener
}

const bootstrap = `
node: {id: test, cluster: test}
admin: {address: {pipe: {path: %[1]q}}}
static_resources:
  listeners:
  - name: tls
    stat_prefix: tls
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3}
            tls_certificate_sds_secret_configs:
            - name: workload
              sds_config: &sds
                resource_api_version: V3
                api_config_source:
                  api_type: %[3]s
                  transport_api_version: V3
                  grpc_services: [{envoy_grpc: {cluster_name: agent}}]
            validation_context_sds_secret_config: {name: bundle, sds_config: *sds}
      filters:
      - name: envoy.filters.network.echo
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}
  clusters:
  - name: agent
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: agent
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[2]q}}}}]}]
`

// startEnvoy runs Envoy until the test ends; apiType is GRPC or DELTA_GRPC. It returns once Envoy has its secrets and listens.
func startEnvoy(t *testing.T, apiType, socket string) *envoy {
	t.Helper()
	binary := envoyBinary(t)
	dir, err := os.MkdirTemp("", "envoy")
	if err != nil {
		t.Fatal(err)
	}
	adminSocket, config := filepath.Join(dir, "admin.sock"), filepath.Join(dir, "bootstrap.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, bootstrap, adminSocket, socket, apiType), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer // read only after Envoy has ended
	cmd := exec.Command(binary, "-c", config, "--disable-hot-restart", "--concurrency", "1", "--drain-time-s", "1", "--log-level", "warning")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also when the test is killed
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the death signal is tied to the thread that starts the process
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed: the exit status says nothing
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	e := &envoy{t: t, admin: http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", adminSocket)
	}}}}
	t.Cleanup(func() {
		e.admin.CloseIdleConnections()
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", log.String())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	e.await("Envoy to be ready", func() bool {
		select {
		case <-ended:
			t.Fatal("Envoy has ended")
		default:
		}
		body, err := e.get("/ready")
		return err == nil && strings.TrimSpace(body) == "LIVE"
	})
	body, err := e.get("/listeners?format=json")
	if err != nil {
		t.Fatal(err)
	}
	var listeners struct {
		Statuses []struct {
			Address struct {
				Socket struct {
					Port int `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal([]byte(body), &listeners); err != nil || len(listeners.Statuses) != 1 {
		t.Fatalf("listeners %s: %v", body, err)
	}
	e.addr = fmt.Sprintf("127.0.0.1:%d", listeners.Statuses[0].Address.Socket.Port)
	return e
}

func (e *envoy) get(path string) (string, error) {
	resp, err := e.admin.Get("http://envoy" + path)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// counter reads one of Envoy's counters.
func (e *envoy) counter(name string) int {
	e.t.Helper()
	body, err := e.get("/stats?filter=" + name)
	if err != nil {
		e.t.Fatal(err)
	}
	for line := range strings.Lines(body) {
		var n int
		if _, err := fmt.Sscanf(line, name+": %d", &n); err == nil {
			return n
		}
	}
	e.t.Fatalf("Envoy has no counter %s: %s", name, body)
	return 0
}

// await polls a condition in another process, which nothing announces.
func (e *envoy) await(what string, done func() bool) {
	e.t.Helper()
	tick, limit := time.NewTicker(20*time.Millisecond), time.After(30*time.Second)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-limit:
			e.t.Fatalf("waited 30 s for %s", what)
		}
	}
}
