package node

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMain(m *testing.M) { netns.TestMain(m) } // for a mount

const conflist = `{"cniVersion":"1.0.0","name":"pods","extra":{"kept":[1,2]},"plugins":[{"type":"bridge","bridge":"br0"},{"type":"portmap"}]}`

// The plugin is the last of the first list, is kept there, and goes again.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	i := Installation{BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"), Binary: write(t, filepath.Join(dir, "mantlet-agent"), "binary 1"),
		StateDir: filepath.Join(dir, "state"), KubeletRoot: "/var/lib/kubelet"}
	for _, d := range []string{i.BinDir, i.ConfDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := i.Install(); err == nil || !strings.Contains(err.Error(), "no CNI configuration") {
		t.Errorf("without a network plugin: %v", err)
	}
	first := write(t, filepath.Join(i.ConfDir, "10-pods.conflist"), conflist)
	other := write(t, filepath.Join(i.ConfDir, "20-other.conflist"), conflist)
	write(t, filepath.Join(i.ConfDir, "05-notes.txt"), "no configuration")
	install := func(want bool) {
		t.Helper()
		if changed, err := i.Install(); err != nil || changed != want {
			t.Fatalf("changed %t, %v, want %t", changed, err, want)
		}
	}
	install(true)
	install(false)
	var got struct {
		CNIVersion, Name string
		Extra            json.RawMessage
		Plugins          []map[string]string
	}
	if err := json.Unmarshal([]byte(read(t, first)), &got); err != nil {
		t.Fatal(err)
	}
	if got.CNIVersion != "1.0.0" || got.Name != "pods" || len(got.Extra) == 0 || len(got.Plugins) != 3 ||
		!reflect.DeepEqual(got.Plugins[2], map[string]string{"type": PluginName, "kubeletRoot": "/var/lib/kubelet", "stateDir": i.StateDir}) {
		t.Errorf("the list is %+v", got)
	}
	if read(t, other) != conflist {
		t.Error("a list that does not count was edited")
	}

	plugin := filepath.Join(i.BinDir, PluginName)
	if info, err := os.Stat(plugin); err != nil || info.Mode().Perm() != 0o755 || read(t, plugin) != "binary 1" {
		t.Errorf("plugin: %v, %v", info, err)
	}
	write(t, i.Binary, "binary 2")
	install(true)
	if read(t, plugin) != "binary 2" {
		t.Error("the plugin stays behind its daemon's version")
	}
	write(t, first, conflist) // the network plugin is upgraded
	install(true)
	i.KubeletRoot = "/elsewhere"
	install(true)
	if n := strings.Count(read(t, first), PluginName); n != 1 {
		t.Errorf("the plugin is %d times in the list", n)
	}

	write(t, filepath.Join(i.StateDir, "c1.json"), "{}")
	for range 2 {
		if err := i.Uninstall(); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, first); got != conflist {
		t.Errorf("after it was uninstalled: %s, want what was there before: %s", got, conflist)
	}
	for _, path := range []string{plugin, i.StateDir} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}

	// In the daemon's container the folder is a mount, which cannot be removed.
	write(t, filepath.Join(i.StateDir, "c1.json"), "{}")
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, with its mounts, ends with the goroutine
		failed <- errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount(i.StateDir, i.StateDir, "", unix.MS_BIND, ""), i.Uninstall())
	}()
	if err := <-failed; err != nil {
		t.Errorf("where the state folder is a mount: %v", err)
	}
	if left, err := os.ReadDir(i.StateDir); err != nil || len(left) > 0 {
		t.Errorf("state that is left: %v, %v", left, err)
	}

	single := write(t, filepath.Join(i.ConfDir, "00-single.conf"), `{"type":"bridge"}`)
	if _, err := i.Install(); err == nil || !strings.Contains(err.Error(), single) {
		t.Errorf("a configuration that is no list: %v", err)
	}
}

// What somebody takes away is put back.
func TestKeep(t *testing.T) {
	dir := t.TempDir()
	i := Installation{BinDir: dir, ConfDir: filepath.Join(dir, "net.d"), Binary: write(t, filepath.Join(dir, "mantlet-agent"), "binary"), StateDir: "/s", KubeletRoot: "/k"}
	conf := write(t, filepath.Join(i.ConfDir, "10-pods.conflist"), conflist)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		i.Keep(ctx, slog.New(slog.DiscardHandler))
	}()
	await := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) { //nolint:forbidigo // files tell of no event
			b, _ := os.ReadFile(conf)
			plugin, _ := os.ReadFile(i.plugin())
			if strings.Contains(string(b), PluginName) && string(plugin) == "binary" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: not installed: %s", what, b)
			}
		}
	}
	await("at first")
	if err := os.Remove(i.plugin()); err != nil {
		t.Fatal(err)
	}
	await("without its binary")
	write(t, conf, conflist)
	await("with a configuration written anew")
	write(t, i.plugin(), "tampered")
	await("with another binary")
	cancel()
	<-ended
}

// What the container runtime says decides, and what is missing is no leave.
func TestPodOf(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(VolumePath(root, "uid-db"), "x"), "")
	if err := os.MkdirAll(podPath(root, "uid-plain"), 0o755); err != nil {
		t.Fatal(err)
	}
	const pod = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db"
	for _, c := range []struct {
		name, args string
		enforced   bool
		err        string
	}{
		{"with a sidecar", pod + ";K8S_POD_UID=uid-db", true, ""},
		{"without", pod + ";K8S_POD_UID=uid-plain", false, ""},
		{"not the kubelet's", "", false, ""},
		{"not known to the kubelet", pod + ";K8S_POD_UID=uid-other", false, "--kubelet-root"},
		{"without a UID", pod, false, "K8S_POD_UID"},
		{"a UID that leads elsewhere", pod + ";K8S_POD_UID=../uid-db", false, "is none"},
	} {
		s, enforced, err := podOf(&skel.CmdArgs{ContainerID: "c1", Netns: "/run/netns/x", Args: c.args}, root)
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.name, err, c.err)
			}
		case err != nil || enforced != c.enforced:
			t.Errorf("%s: %t, %v, want %t", c.name, enforced, err, c.enforced)
		case enforced && s != State{ContainerID: "c1", Netns: "/run/netns/x", Namespace: "shop", Name: "db", UID: "uid-db"}:
			t.Errorf("%s: %+v", c.name, s)
		}
	}
}

func TestState(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	want := State{ContainerID: "c1", Netns: "/run/netns/x", Namespace: "shop", Name: "db", UID: "uid-db"}
	if err := want.write(dir); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "c2.json"), "half")
	write(t, filepath.Join(dir, "c3.json"), read(t, filepath.Join(dir, "c1.json"))) // another's
	write(t, filepath.Join(dir, ".mantlet-1"), "being written")
	got, err := readStates(dir)
	if !reflect.DeepEqual(got, []State{want}) || err == nil || !strings.Contains(err.Error(), "c2.json") || !strings.Contains(err.Error(), "c3.json") {
		t.Errorf("%+v, %v", got, err)
	}
	for _, id := range []string{"", "../c1", ".", "a/b"} {
		if err := removeState(dir, id); err == nil {
			t.Errorf("container ID %q is taken", id)
		}
		bad := want
		bad.ContainerID = id
		if err := bad.write(dir); err == nil {
			t.Errorf("container ID %q is written", id)
		}
	}
	for range 2 {
		if err := removeState(dir, "c1"); err != nil {
			t.Error(err)
		}
	}
}

func TestInPod(t *testing.T) {
	const uid = "0f4d6c1e-9a53-4c3b-8a4f-3f1f6a7d9e10"
	const under = "0f4d6c1e_9a53_4c3b_8a4f_3f1f6a7d9e10"
	for text, want := range map[string]bool{
		"0::/kubepods/burstable/pod" + uid + "/c1\n":                                   true,
		"9:pids:/k8s-n1/kubepods/pod" + uid + "/c1\n0::/\n":                            true,
		"0::/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-c1.scope\n": true,
		"0::/kubepods.slice/kubepods-besteffort-pod" + under + ".slice/x.scope\n":      true,
		"0::/../../pod" + uid + "/c1\n":                                                true,
		"0::/user.slice/mine-pod" + under + ".slice\n":                                 false,
		"0::/kubepods/burstable/podother/c1-pod" + uid + "\n":                          false,
		"0::/kubepods/burstable/pod" + uid + "x/c1\n":                                  false,
		"0::/\n": false,
		"":       false,
	} {
		if got := inPod([]byte(text), uid); got != want {
			t.Errorf("%q: %t", text, got)
		}
	}
}

// What a pod puts into its volume leads nowhere else.
func TestConnectTrustsNothing(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "other.sock")
	l, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listens := func(as proxyuser.User) func(string) error {
		return func(v string) error {
			if err := errors.Join(os.Chmod(filepath.Dir(v), 0o755), os.Chmod(v, 0o755), os.Chmod(filepath.Join(v, "agent"), 0o777)); err != nil {
				return err
			}
			var l net.Listener
			var err error
			podtest.As(int(as.UID), int(as.GID), func() { l, err = net.Listen("unix", filepath.Join(v, socketIn)) })
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		}
	}
	u := proxyuser.Pod.User(proxyuser.Seed{7: 1, 15: 2})
	cases := map[string]struct {
		make func(volume string) error
		want string
	}{
		"link to a socket": {func(v string) error { return os.Symlink(elsewhere, filepath.Join(v, socketIn)) }, "no socket"},
		"a file":           {func(v string) error { return os.WriteFile(filepath.Join(v, socketIn), nil, 0o666) }, "no socket"},
		"somebody else's socket": {func(v string) error {
			other, err := net.Listen("unix", filepath.Join(v, socketIn))
			if err == nil {
				t.Cleanup(func() { other.Close() })
			}
			return err
		}, "user 0, group 0 listens on the agent's socket"},
	}
	if podtest.SingleUser() {
		t.Log("this user namespace maps one user only: other users than root are not tried")
	} else {
		for _, other := range []proxyuser.User{
			{UID: 15150, GID: 15150}, {UID: u.UID, GID: 0}, {UID: 1000, GID: u.GID}, {UID: proxyuser.Pod.First - 1, GID: u.GID}, proxyuser.Mapped.User(proxyuser.Seed{}),
		} {
			want := other.String() + " listens on the agent's socket, and sidecars are of 2000000000–2134217727, both"
			cases[other.String()] = struct {
				make func(volume string) error
				want string
			}{listens(other), want}
		}
		volume := t.TempDir()
		if err := errors.Join(os.Mkdir(filepath.Join(volume, "agent"), 0o755), listens(u)(volume)); err != nil {
			t.Fatal(err)
		}
		conn, got, err := Await(t.Context(), volume)
		if err != nil || got != u {
			t.Fatalf("the agent's socket: %s, %v, want %s", got, err, u)
		}
		conn.Close()
	}
	for name, c := range cases {
		volume := t.TempDir()
		if err := os.Mkdir(filepath.Join(volume, "agent"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := c.make(volume); err != nil {
			t.Fatal(err)
		}
		if conn, _, err := connect(volume); err == nil {
			conn.Close()
			t.Errorf("%s: connected", name)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	volume := t.TempDir()
	if err := os.Symlink(filepath.Dir(elsewhere), filepath.Join(volume, "agent")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := connect(volume); err == nil || !strings.Contains(err.Error(), "too many levels") {
		t.Errorf("link to a folder: %v", err)
	}
}
