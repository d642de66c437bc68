package ask

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/status"
)

// protocol is the port-forward protocol of API servers and kubelets: for each connection a stream with its bytes, and one on which the kubelet
// says why it cannot be had. client-go's PortForwarder speaks it too, behind a port that it opens on this machine to whoever is on it; the
// kubelet's reason it only logs.
const protocol = "portforward.k8s.io"

// forward asks the replica in a pod.
func (s Source) forward(ctx context.Context, client kubernetes.Interface, pod string) (status.Report, error) {
	at := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(s.Namespace).Name(pod).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(s.API)
	if err != nil {
		return status.Report{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at.String(), nil)
	if err != nil {
		return status.Report{}, err
	}
	conn, _, err := spdy.NegotiateStreaming(upgrader, &http.Client{Transport: transport}, req, protocol)
	if err != nil {
		return status.Report{}, fmt.Errorf("forward: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stopped := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stopped()
	reason, data, err := streams(conn, names.StatusPort)
	if err != nil {
		return status.Report{}, fmt.Errorf("forward: %w", err)
	}
	r, err := get(ctx, "http://"+pod, single{data})
	if err == nil {
		return r, nil
	}
	_ = data.Reset() // what is not read keeps the reason from coming
	patience := time.AfterFunc(time.Second, func() { _ = conn.Close() })
	defer patience.Stop()
	if why, _ := io.ReadAll(reason); len(why) > 0 {
		err = errors.New(strings.TrimSpace(string(why)))
	}
	return r, fmt.Errorf("forward to port %d: %w", names.StatusPort, err)
}

// streams are those of one connection to a port.
func streams(conn httpstream.Connection, port int) (reason, data httpstream.Stream, err error) {
	headers := http.Header{}
	headers.Set(corev1.PortHeader, strconv.Itoa(port))
	headers.Set(corev1.PortForwardRequestIDHeader, "0")
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	if reason, err = conn.CreateStream(headers); err != nil {
		return nil, nil, err
	}
	if err := reason.Close(); err != nil { // nothing is written there
		return nil, nil, err
	}
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err = conn.CreateStream(headers)
	return reason, data, err
}

// single is a transport for one request over a stream.
type single struct{ stream io.ReadWriter }

// RoundTrip sends the request and reads the head of the answer.
func (s single) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := req.Write(s.stream); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(s.stream), req)
}
