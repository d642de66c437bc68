package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// envoyBinary finds the real Envoy. Without it the test fails: what it shows cannot be shown otherwise.
func envoyBinary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("MANTLET_ENVOY"); path != "" {
		return path
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the test")
		}
		dir = filepath.Dir(dir)
	}
	path := filepath.Join(dir, ".cache", "envoy", "envoy")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Envoy at $MANTLET_ENVOY or %s; run: make envoy", path)
	}
	return path
}

// envoy is a running Envoy whose only configuration is a delta ADS stream over a unix socket.
type envoy struct {
	t     *testing.T
	admin *http.Client
}

// startEnvoy runs Envoy until the test ends. It names itself to the test's authenticator by metadata.
func startEnvoy(t *testing.T, client, socket string) *envoy {
	t.Helper()
	dir := shortDir(t)
	adminSocket := filepath.Join(dir, "admin")
	bootstrap := fmt.Sprintf(`
node: {id: not-asked, cluster: not-asked}
admin: {address: {pipe: {path: %q}}}
dynamic_resources:
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    grpc_services: [{envoy_grpc: {cluster_name: control-plane}, initial_metadata: [{key: %s, value: %q}]}]
  lds_config: {ads: {}, resource_api_version: V3}
  cds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: control-plane
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: control-plane, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %q}}}}]}]}
`, adminSocket, clientKey, client, socket)
	config := filepath.Join(dir, "bootstrap.yaml")
	if err := os.WriteFile(config, []byte(bootstrap), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(envoyBinary(t), "-c", config, "--concurrency", "1", "--use-dynamic-base-id", "--drain-time-s", "1",
		"--log-level", "warning", "--component-log-level", "upstream:trace,config:debug,misc:error")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if path := os.Getenv("MANTLET_TEST_ENVOY_LOG"); path != "" {
			_ = os.WriteFile(path, log.Bytes(), 0o600)
		}
		if t.Failed() {
			tail := log.String()
			t.Logf("end of Envoy's log:\n%s", tail[max(0, len(tail)-4000):])
		}
	})
	return &envoy{t, &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", adminSocket)
		},
	}}}
}

// stat reads one counter or gauge from Envoy.
func (e *envoy) stat(name string) int {
	e.t.Helper()
	resp, err := e.admin.Get("http://admin/stats?format=json&filter=^" + strings.ReplaceAll(name, ".", `\.`) + "$")
	if err != nil {
		e.t.Fatalf("Envoy's admin: %v", err)
	}
	defer resp.Body.Close()
	var out struct {
		Stats []struct {
			Name  string
			Value int
		}
	}
	body, _ := io.ReadAll(resp.Body)
	if err := json.Unmarshal(body, &out); err != nil {
		e.t.Fatalf("Envoy's stats: %v: %s", err, body)
	}
	for _, s := range out.Stats {
		if s.Name == name {
			return s.Value
		}
	}
	return 0
}

// shortDir is a directory whose path fits a unix socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "xds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// banner is an app that speaks first, until the test ends; it returns its port.
func banner(t *testing.T, text string) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text)
			_ = c.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// freePort returns a port that nobody listens on, below those that connections get by themselves (net.ipv4.ip_local_port_range, 32768 and up): one of these
// can be somebody's before Envoy has it.
func freePort(t *testing.T) int {
	t.Helper()
	var err error
	for range 20 {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", 10000+rand.IntN(20000))); err == nil {
			defer l.Close()
			return l.Addr().(*net.TCPAddr).Port
		}
	}
	t.Fatal(err)
	return 0
}

// dial connects and reads to the end; it returns what came and how long the whole took.
func dial(t *testing.T, address string) (string, time.Duration) {
	t.Helper()
	start := time.Now()
	c, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return "dial: " + err.Error(), time.Since(start)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	got, _ := io.ReadAll(c)
	return string(got), time.Since(start)
}
