package console

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestMain(m *testing.M) { netns.TestMain(m) }

// host is a sandbox of one pod.
type host struct {
	pod     *netns.Pod
	started chan *netns.Process
}

func (h *host) Exec(ctx context.Context, pod string, s netns.Session) (*netns.Process, error) {
	if pod != h.pod.Name() {
		return nil, fmt.Errorf("there is no pod %q", pod)
	}
	p, err := h.pod.Exec(ctx, s)
	if err == nil {
		h.started <- p
	}
	return p, err
}

// serve lets callers into a pod until the test ends.
func serve(t *testing.T) *host {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t, goleak.IgnoreTopFunction("os/signal.loop")) }) // last of all
	network, err := netns.New(netns.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = network.Close() })
	pod, err := network.AddPod(t.Context(), netns.PodSpec{Namespace: "shop", Name: "web", IPs: []netip.Addr{netip.MustParseAddr("10.64.0.9")}})
	if err != nil {
		t.Fatal(err)
	}
	h := &host{pod: pod, started: make(chan *netns.Process, 100)}
	file, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, file, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		_ = file.Close()
	})
	return h
}

// call runs a command and returns its output.
func call(t *testing.T, input string, args ...string) (output string, code int, err error) {
	t.Helper()
	in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(in, []byte(input), 0o600); err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	c := Call{Sandbox: os.Getpid(), Pod: "shop/web", Args: args, Env: []string{"PATH=/usr/bin:/bin"}, Dir: "/"}
	code, err = c.run([3]*os.File{stdin, stdout, stdout}, false)
	text, rerr := os.ReadFile(out)
	if rerr != nil {
		t.Fatal(rerr)
	}
	return string(text), code, err
}

func TestPodIsEnteredAsAnApp(t *testing.T) {
	h := serve(t)
	if err := h.pod.SetHosts([]byte("10.64.0.77 db db.shop\n")); err != nil {
		t.Fatal(err)
	}
	out, code, err := call(t, "typed\n", "sh", "-c", `cat; id -u; hostname; pwd; grep CapBnd /proc/self/status; getent hosts db.shop; exit 7`)
	if err != nil || code != 7 {
		t.Errorf("exit code %d, error %v, want 7 and none; output:\n%s", code, err, out)
	}
	for _, want := range []string{"typed\n", "\nweb\n", "\n/\n", "CapBnd:\t0000000000000000\n", "10.64.0.77 "} {
		if !strings.Contains("\n"+out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if e, err := netns.Enclosed(); err != nil || !e.SingleUID && !strings.Contains(out, "\n1000\n") {
		t.Errorf("not the app's user (%v):\n%s", err, out)
	}
	// Names may change while programs run; those in force are those in the file.
	if err := h.pod.SetHosts([]byte("10.64.0.78 db db.shop\n")); err != nil {
		t.Fatal(err)
	}
	if out, _, _ := call(t, "", "getent", "hosts", "db"); !strings.Contains(out, "10.64.0.78") {
		t.Errorf("db is %q, want the new address", out)
	}
	if text, _ := os.ReadFile("/etc/hosts"); strings.Contains(string(text), "10.64.0.7") {
		t.Error("the machine's own /etc/hosts was changed")
	}
}

func TestWhatCannotRunSaysSo(t *testing.T) {
	serve(t)
	for _, c := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"no-such-program"}, 127, "not found"},
		{[]string{"/etc"}, 126, ""},
		{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15, ""},
	} {
		out, code, err := call(t, "", c.args...)
		if err != nil || code != c.code || !strings.Contains(out, c.text) {
			t.Errorf("%v: exit code %d, error %v, output %q; want code %d and %q", c.args, code, err, out, c.code, c.text)
		}
	}
	c := Call{Sandbox: os.Getpid(), Pod: "shop/nobody", Args: []string{"true"}}
	if _, err := c.run([3]*os.File{os.Stdin, os.Stdout, os.Stderr}, false); err == nil || !strings.Contains(err.Error(), `no pod "shop/nobody"`) {
		t.Errorf("unknown pod: %v", err)
	}
	c.Sandbox = 1 << 30
	if _, err := c.run([3]*os.File{os.Stdin, os.Stdout, os.Stderr}, false); err == nil || !strings.Contains(err.Error(), "no sandbox") {
		t.Errorf("unknown sandbox: %v", err)
	}
}

// A caller that is gone leaves nothing running in the pod.
func TestCallerGone(t *testing.T) {
	h := serve(t)
	conn := dial(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if err := sendFiles(conn, [3]*os.File{read, write, write}); err != nil {
		t.Fatal(err)
	}
	_ = write.Close()
	if _, err := io.WriteString(conn, `{"pod":"shop/web","args":["/bin/cat"],"env":[]}`); err != nil {
		t.Fatal(err)
	}
	p := <-h.started
	_ = conn.Close()
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the program outlives its caller")
	}
}

// What is not a call is turned away, and does not keep others out.
func TestRudeCallers(t *testing.T) {
	serve(t)
	for _, text := range []string{"", "x", "\x00{", strings.Repeat("[", 1000)} {
		conn := dial(t)
		_, _ = io.WriteString(conn, text)
		_ = conn.CloseWrite()
		_, _ = io.ReadAll(conn)
		_ = conn.Close()
	}
	if _, code, err := call(t, "", "true"); code != 0 || err != nil {
		t.Errorf("exit code %d, error %v", code, err)
	}
}

func dial(t *testing.T) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: prefix() + strconv.Itoa(os.Getpid()), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestTerminal(t *testing.T) {
	serve(t)
	inner, theirs, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	shown := make(chan string)
	go func() {
		text, _ := io.ReadAll(inner) // ends with EIO when nobody holds the other side any more
		shown <- string(text)
	}()
	c := Call{Sandbox: os.Getpid(), Pod: "shop/web", Args: []string{"sh", "-c", "tty >/dev/null && echo controlled by $(ps -o tty= -p $$ | tr -d ' ')"}, Env: []string{"PATH=/usr/bin:/bin"}}
	code, err := c.run([3]*os.File{theirs, theirs, theirs}, true)
	_ = theirs.Close()
	if text := <-shown; err != nil || code != 0 || !strings.Contains(text, "controlled by pts/") {
		t.Errorf("exit code %d, error %v, shown %q", code, err, text)
	}
}

func TestRunning(t *testing.T) {
	serve(t)
	list, err := Running()
	if err != nil || len(list) != 1 || list[0] != os.Getpid() {
		t.Errorf("running: %v, %v; want this process alone, %d", list, err, os.Getpid())
	}
}
