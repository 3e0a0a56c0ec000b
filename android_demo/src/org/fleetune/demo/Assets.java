package org.fleetune.demo;

import java.util.HashMap;
import java.util.Locale;
import java.util.Map;

/** Which file of the app answers an address, and with which type and headers. Knows nothing of Android: tested on a JVM. */
final class Assets {
    /** Reserved by Android for content of an app; never looked up. Its https makes the page a secure context. */
    static final String ORIGIN = "https://appassets.androidplatform.net";

    private static final String FOLDER = "www";
    private static final String START = "index.html";
    private static final Map<String, String> TYPES = new HashMap<String, String>();

    static {
        TYPES.put("css", "text/css");
        TYPES.put("html", "text/html");
        TYPES.put("ico", "image/x-icon");
        TYPES.put("js", "text/javascript");
        TYPES.put("json", "application/json");
        TYPES.put("mjs", "text/javascript");
        TYPES.put("onnx", "application/octet-stream");
        TYPES.put("png", "image/png");
        TYPES.put("safetensors", "application/octet-stream");
        TYPES.put("svg", "image/svg+xml");
        TYPES.put("txt", "text/plain");
        TYPES.put("wasm", "application/wasm");
        TYPES.put("webmanifest", "application/manifest+json");
    }

    private Assets() {
    }

    /**
     * Name the file for the path of an address, decoded ({@code /engine/chain.mjs}).
     *
     * @return the name below the app's assets, or null for a path that leaves them or is not one
     */
    static String fileOf(String path) {
        if (path == null || !path.startsWith("/") || path.indexOf('\\') >= 0 || path.indexOf('\0') >= 0) {
            return null;
        }
        String name = path.substring(1);
        if (name.isEmpty()) {
            return FOLDER + "/" + START;
        }
        for (String part : name.split("/", -1)) {
            if (part.isEmpty() || part.equals(".") || part.equals("..")) {
                return null;
            }
        }
        return FOLDER + "/" + name;
    }

    /** MIME type by the file's ending; bytes where the ending is not known. */
    static String typeOf(String file) {
        String ending = file.substring(file.lastIndexOf('.') + 1).toLowerCase(Locale.ROOT);
        String found = TYPES.get(ending);
        return found == null ? "application/octet-stream" : found;
    }

    /** What text is encoded in, null for anything else. */
    static String charsetOf(String type) {
        return type.startsWith("text/") || type.endsWith("json") || type.endsWith("xml") ? "utf-8" : null;
    }

    /** The headers that `fleetune web` sends; the MQTT server may be any, as the page is told which. */
    static Map<String, String> headers() {
        Map<String, String> found = new HashMap<String, String>();
        found.put("Cross-Origin-Opener-Policy", "same-origin");
        found.put("Cross-Origin-Embedder-Policy", "require-corp");
        found.put("Cross-Origin-Resource-Policy", "same-origin");
        found.put("Content-Security-Policy", "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
                + "style-src 'self'; img-src 'self'; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
        found.put("Permissions-Policy", "camera=(), geolocation=(), microphone=()");
        found.put("X-Content-Type-Options", "nosniff");
        found.put("Referrer-Policy", "no-referrer");
        found.put("Cache-Control", "no-cache");
        return found;
    }

    /** Whether a whole address is one of the app's own. */
    static boolean isOwn(String address) {
        return address != null && (address.equals(ORIGIN) || address.startsWith(ORIGIN + "/"));
    }
}
