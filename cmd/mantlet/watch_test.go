package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
)

const watchedPods = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: bystander, namespace: shop, labels: {app: bystander}}, spec: {containers: [{name: c, image: i}]}}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
`

// watchedPolicy isolates api, which admits pods of one app.
func watchedPolicy(app string) string {
	return `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{podSelector: {matchLabels: {app: ` + app + `}}}], ports: [{port: 8080}]}]}
`
}

// TestWatch runs the command as a person does: edits while it runs, commands in its pods from another terminal, files that cannot be applied, Ctrl-C.
func TestWatch(t *testing.T) {
	w := startWatch(t)
	w.await(`pods and sidecars ready after`)
	w.await(`watching for edits`)
	hello := []string{"bash", "-c", "exec 3<>/dev/tcp/api/80 && echo hi >&3 && head -1 <&3"}

	if code, out := w.exec("shop/web", "getent", "hosts", "api"); code != 0 || !strings.Contains(out, "api") {
		t.Errorf("names in the pod: exit code %d, %q", code, out)
	}
	if code, out := w.exec("shop/web", hello...); code != 0 || !strings.Contains(out, `"pod":"shop/api","port":8080,"nonce":"hi"`) {
		t.Errorf("web → api, which policy allows: exit code %d, %q", code, out)
	}
	if code, _ := w.exec("shop/web", "sh", "-c", "exit 7"); code != 7 {
		t.Errorf("exit code %d of a command that ended with 7", code)
	}
	if code, out := w.exec("shop/nobody", "true"); code != 1 || !strings.Contains(out, "shop/nobody") {
		t.Errorf("in a pod that is not there: exit code %d, %q", code, out)
	}

	w.edit("policy.yaml", watchedPolicy("bystander"))
	w.await(`\n\d\d:\d\d:\d\d  NetworkPolicy shop/api changed\n` +
		`  in force after \S+ \(\S+ after it was written\) in (\d+) sidecars, [1-9]\d* bytes of [A-Z][A-Za-z, ]*: shop/api, shop/`)
	w.await(`now allowed: shop/bystander → shop/api`)
	w.await(`now denied: shop/web → shop/api`)
	w.await(`connections tried: .* 0 differ from the evaluator`)
	if code, out := w.exec("shop/web", hello...); code == 0 {
		t.Errorf("web → api, which policy denies now: %q", out)
	}

	w.edit("policy.yaml", strings.TrimSuffix(watchedPolicy("web"), "]}]}\n")) // an editor is half-way through
	w.await(`(?s)error: .*policy\.yaml.*what was in force stays in force`)
	w.denies(hello)
	w.edit("policy.yaml", watchedPolicy("bystander"))
	w.edit("other.yaml", `{apiVersion: v1, kind: Pod, metadata: {name: far, namespace: shop}, spec: {containers: [{name: c, image: i}]}, status: {podIP: 192.0.2.7}}`)
	w.await(`(?s)error: .*outside the networks.*hint: start the sandbox anew\nwhat was in force stays in force`)
	w.denies(hello)
	if err := os.Remove(filepath.Join(w.dir, "other.yaml")); err != nil {
		t.Fatal(err)
	}
	w.edit("policy.yaml", watchedPolicy("web"))
	w.await(`NetworkPolicy shop/api changed`)
	w.await(`now allowed: shop/web → shop/api`)
	w.await(`connections tried: .* 0 differ from the evaluator`)
	if code, out := w.exec("shop/web", hello...); code != 0 {
		t.Errorf("web → api, which policy allows again: exit code %d, %q", code, out)
	}
	w.end()
}

// watched is `mantlet sandbox --watch` as a process.
type watched struct {
	t    *testing.T
	bin  string
	dir  string // of the manifests
	cmd  *exec.Cmd
	over chan error // what Wait says

	mu   sync.Mutex
	said bytes.Buffer // on standard output and standard error, since the last await that was content
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said.Write(p)
}

const watchPatience = 4 * time.Minute

func startWatch(t *testing.T) *watched {
	t.Helper()
	envoy := os.Getenv("MANTLET_ENVOY")
	if envoy == "" {
		var err error
		if envoy, err = filepath.Abs("../../.cache/envoy/envoy"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(envoy); err != nil {
		t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	bin := t.TempDir()
	build := exec.Command("go", "build", "-race", "-o", bin, ".", "../mantlet-agent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	w := &watched{t: t, bin: filepath.Join(bin, "mantlet"), dir: t.TempDir(), over: make(chan error, 1)}
	w.edit("pods.yaml", watchedPods)
	w.edit("policy.yaml", watchedPolicy("web"))
	w.cmd = exec.Command(w.bin, "sandbox", "-f", w.dir, "--watch") //nolint:gosec // just built
	w.cmd.Env = append(os.Environ(), "MANTLET_ENVOY="+envoy, "MANTLET_AGENT=")
	w.cmd.Stdout, w.cmd.Stderr = w, w
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { w.over <- w.cmd.Wait() }()
	t.Cleanup(func() { // where the test has failed half-way: the namespaces go with the process
		_ = w.cmd.Process.Kill()
	})
	return w
}

// edit writes a file as editors do: a new one takes the place of the old one.
func (w *watched) edit(name, text string) {
	w.t.Helper()
	next := filepath.Join(w.t.TempDir(), name)
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(w.dir, name)); err != nil {
		w.t.Fatal(err)
	}
}

// await waits until the process has said something, and forgets what it said until then.
func (w *watched) await(pattern string) {
	w.t.Helper()
	re := regexp.MustCompile(pattern)
	limit := time.After(watchPatience)
	for {
		w.mu.Lock()
		text := w.said.String()
		at := re.FindStringIndex(text)
		if at != nil {
			w.said.Next(at[1])
		}
		w.mu.Unlock()
		if at != nil {
			w.t.Log(text[at[0]:at[1]])
			return
		}
		select {
		case err := <-w.over:
			w.t.Fatalf("the sandbox has ended (%v), and has not said %q but\n%s", err, pattern, text)
		case <-limit:
			w.t.Fatalf("waited %s for %q; it said\n%s", watchPatience, pattern, text)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// exec runs a command in a pod, from another terminal.
func (w *watched) exec(pod string, command ...string) (code int, out string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), watchPatience)
	defer cancel()
	args := append([]string{"sandbox", "exec", "--sandbox", strconv.Itoa(w.cmd.Process.Pid), pod, "--"}, command...)
	text, err := exec.CommandContext(ctx, w.bin, args...).CombinedOutput() //nolint:gosec // just built
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode(), string(text)
	case err != nil:
		w.t.Fatal(err)
	}
	return 0, string(text)
}

// denies wants the policy to be in force that keeps web from api.
func (w *watched) denies(command []string) {
	w.t.Helper()
	if code, out := w.exec("shop/web", command...); code == 0 {
		w.t.Errorf("web → api, which the policy in force denies: %q", out)
	}
}

// end interrupts the process; it ends well, and so does all that it had started.
func (w *watched) end() {
	w.t.Helper()
	family := descendants(w.t, w.cmd.Process.Pid)
	envoys := 0
	for _, p := range family {
		if strings.HasPrefix(p.name, "envoy") {
			envoys++
		}
	}
	if envoys != 3 {
		w.t.Errorf("%d Envoys among what runs, want 3: %v", envoys, family)
	}
	if err := w.cmd.Process.Signal(syscall.SIGINT); err != nil {
		w.t.Fatal(err)
	}
	select {
	case err := <-w.over:
		if err != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Errorf("after Ctrl-C: %v\n%s", err, w.said.String())
		}
	case <-time.After(watchPatience):
		w.t.Fatalf("it is still there %s after Ctrl-C", watchPatience)
	}
	for _, p := range family {
		if now, err := look(p.pid); err == nil && now.began == p.began {
			w.t.Errorf("left behind: %+v", now)
		}
	}
	if code, out := w.exec("shop/web", "true"); code != 1 {
		w.t.Errorf("exec after its end: exit code %d, %q", code, out)
	}
}

// process is one of /proc.
type process struct {
	pid, parent int
	name        string
	began       string // ticks since boot: with it nobody else is taken for it who has its number later
}

// look reads /proc/PID/stat: proc_pid_stat(5).
func look(pid int) (process, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	_, rest, _ := strings.Cut(string(text), "(")
	end := strings.LastIndex(rest, ")")
	if end < 0 {
		return process{}, fmt.Errorf("process %d: %q", pid, text)
	}
	const parent, began = 4 - 3, 22 - 3 // fields after the name, which is the second
	fields := strings.Fields(rest[end+1:])
	if len(fields) <= began {
		return process{}, fmt.Errorf("process %d: %q", pid, text)
	}
	p := process{pid: pid, name: rest[:end], began: fields[began]}
	p.parent, err = strconv.Atoi(fields[parent])
	return p, err
}

// descendants are what a process has started, and what these have.
func descendants(t *testing.T, of int) (out []process) {
	t.Helper()
	list, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	children := map[int][]process{}
	for _, e := range list {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := look(pid); err == nil { // else it has just ended
			children[p.parent] = append(children[p.parent], p)
		}
	}
	for next := []int{of}; len(next) > 0; next = next[1:] {
		for _, p := range children[next[0]] {
			out = append(out, p)
			next = append(next, p.pid)
		}
	}
	return out
}

// What the kernel dropped may have been an edit, and is no reason to end; what makes watching impossible is.
func TestEdited(t *testing.T) {
	broken := errors.New("bad file descriptor")
	for _, test := range []struct {
		told, want error
	}{
		{fsnotify.ErrEventOverflow, nil},
		{broken, broken},
	} {
		w := &fsnotify.Watcher{Events: make(chan fsnotify.Event), Errors: make(chan error, 1)}
		w.Errors <- test.told
		if err := edited(t.Context(), w); !errors.Is(err, test.want) {
			t.Errorf("%v: %v, want %v", test.told, err, test.want)
		}
	}
	w := &fsnotify.Watcher{Events: make(chan fsnotify.Event, 1), Errors: make(chan error)}
	w.Events <- fsnotify.Event{Name: "policy.yaml", Op: fsnotify.Write}
	if err := edited(t.Context(), w); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := edited(ended, w); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
